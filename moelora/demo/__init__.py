"""The demo: a real model learns a mixture over several skills, and shows who serves what.

`job.run_demo` is the whole of it. Data (`skills`, `sources`), training (`batches`, `model`,
`train`), evaluation (`usage`, `reload`) and reporting (`results`, `figure`, `page`) know nothing
of each other beyond the dataclasses they exchange.
"""
