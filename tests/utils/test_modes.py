import timm
import torch
from torch import nn

from timm_mixpath.utils.modes import without_memory


def test_without_memory_nothing_is_initialised() -> None:
    state = torch.get_rng_state()
    with without_memory():
        network = timm.create_model('mobilenetv3_small_050')
        assert nn.init.trunc_normal_(network.classifier.weight) is network.classifier.weight
        assert nn.init.ones_(tensor=network.classifier.bias) is network.classifier.bias
    assert all(p.is_meta for p in network.parameters()) and torch.equal(torch.get_rng_state(), state)
    plain = timm.create_model('mobilenetv3_small_050')
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}

    # Behind the context all is as it was
    linear = nn.Linear(2, 2)
    assert not linear.weight.is_meta and torch.equal(nn.init.ones_(linear.weight), torch.ones(2, 2))


def test_without_memory_initialisers_are_not_called(monkeypatch) -> None:
    with without_memory():
        weight = torch.empty(3, 3)
        monkeypatch.setattr(nn.init, '_no_grad_normal_', lambda *_: 1 / 0)
        nn.init.normal_(weight)
