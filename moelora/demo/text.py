"""Words that the picture and the page share."""


def short_name(module_name: str) -> str:
    """Return a module's name without the containers around its block.

    Args:
        module_name: as in ``model.named_modules()``.

    Example:
        >>> short_name("model.layers.3.self_attn.q_proj")
        'layer 3 self_attn.q_proj'
    """
    parts = module_name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return f"layer {part} {'.'.join(parts[position + 1 :])}".rstrip()
    return module_name
