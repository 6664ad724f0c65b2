"""What is asked, and how answers are judged: a benchmark a file."""
