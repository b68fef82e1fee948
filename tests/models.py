"""Small mixtures of experts for tests of inputs: a list of expert modules, and one stacked tensor a role."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

VOCABULARY, HIDDEN, INNER, EXPERTS, TOP_K = 32, 32, 64, 4, 2


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k, self.num_experts = TOP_K, EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x):
        scores, experts = torch.topk((x @ self.weight.T).softmax(-1), self.top_k)
        return scores / scores.sum(-1, keepdim=True), experts


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ListMoE(nn.Module):
    """As Mixtral in transformers 4: each expert a module, called with its own tokens, if it has any."""

    def __init__(self):
        super().__init__()
        self.gate = Router()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        tokens = x.reshape(-1, HIDDEN)
        scores, chosen = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]) * scores[token, slot, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)  # ModelOpt quantizes what goes into a LayerNorm, too
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = moe()

    def forward(self, x):
        return x + self.mlp(self.norm(x + self.proj(x)))


class LanguageModel(nn.Module):
    def __init__(self, moe=ListMoE, layers=2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block(moe) for _ in range(layers))
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def language_model(moe=ListMoE, seed=0):
    """The model in eval mode, each expert with a magnitude of its own; and its parameters."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU
        torch.manual_seed(seed)
        model = LanguageModel(moe).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".experts." in name:
                param.mul_(2.0 ** int(name.split(".experts.")[1].split(".")[0]))
    return model, dict(model.named_parameters())


def tokens(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
