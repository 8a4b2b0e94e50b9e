"""Attacks on an unlearned model: what somebody who holds it can still find out about erased records."""
