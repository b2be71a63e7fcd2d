"""What serving costs and whether it holds, a command a question: `python -m benchmarks.serving`."""
