"""The training of the demo model: `python -m flux_batch.demo.train`; nothing else imports it."""
