"""Methods side by side: what they answer, what an erasure costs them, and the figures of both."""
