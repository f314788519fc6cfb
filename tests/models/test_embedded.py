"""The embedded default is what its card says."""

import jax
import numpy as np
import pytest

from xviz_jax.models import embedded


def test_the_card_is_true():
    card = embedded.card()
    config = embedded.load().config
    assert config.grid**2 >= 196
    assert config.depth >= 4
    assert config.heads >= 4
    assert card["test_accuracy"] >= 0.88
    assert "--seed" in card["command"]
    forward, parameters = embedded.functional()
    images, labels = embedded.images()
    assert images.shape == (1000, 28, 28)
    assert labels.shape == (1000,)
    assert images.min() == 0
    assert images.max() == 1
    program = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    logits = np.concatenate([program(parameters, c) for c in np.split(images, 20)])
    accuracy = np.mean(logits.argmax(axis=-1) == labels)
    # A tie may fall differently on another machine, no more.
    assert abs(accuracy - card["test_accuracy_of_the_images"]) <= 0.002


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    other = {**embedded.card()}
    other["config"] = {**other["config"], "width": 32}
    monkeypatch.setattr(embedded, "card", lambda: other)
    with pytest.raises(ValueError, match="but the model has"):
        embedded.load()
    other["config"] = {**embedded.card()["config"], "depth": 3, "width": 64}
    with pytest.raises(ValueError, match="the model does not"):
        embedded.load()
    other["config"] = {**other["config"], "depth": 5}
    with pytest.raises(ValueError, match="the weights lack"):
        embedded.load()
