"""A workdir as an HTTP service: predictions, requests to erase and rectify, receipts, and a console."""
