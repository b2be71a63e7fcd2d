"""`output_hidden_states=True` and a scikit-learn probe on the host: the simplest guard to write.

All layers' states of the newest token are copied to the host and given to a pipeline of a
scaler and a logistic regression at each token.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from safe_decode.bench.arms import ArmCall, called_last
from safe_decode.bench.models import Subject

__all__ = ["probed_on_host"]


def probed_on_host(subject: Subject, *, seed: int = 0) -> ArmCall:
    """Build the arm; the probe is fitted on random numbers."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = subject.model
    config = model.config
    rng = np.random.default_rng(seed)
    width = config.num_hidden_layers * config.hidden_size
    labels = np.arange(64) % 2
    states = rng.normal(size=(64, width)).astype(np.float32)
    probe = make_pipeline(StandardScaler(), LogisticRegression()).fit(states, labels)

    def run(**options: object) -> None:
        held: list[Any] = []

        def keep(
            _module: object, _args: object, _kwargs: object, output: CausalLMOutputWithPast
        ) -> None:
            held.append(output.hidden_states)

        def processor(_ids: Tensor, scores: Tensor) -> Tensor:
            newest = [state[:, -1].float().cpu().numpy() for state in held.pop()[1:]]
            (probe.predict_proba(np.concatenate(newest, axis=1))[:, 1] > 2).any()
            return scores

        handle = cast(nn.Module, model).register_forward_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad(), called_last(model, processor):
                model.generate(**options, output_hidden_states=True, return_dict_in_generate=True)
        finally:
            handle.remove()

    return run
