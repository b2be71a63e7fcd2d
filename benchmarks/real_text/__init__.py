"""Probes on a real chat model and real text: which statistic, read where, right at what length."""
