"""How the demo model was made: `python -m flux_batch.demo.train`; nothing else imports this."""
