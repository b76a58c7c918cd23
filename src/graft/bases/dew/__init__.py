"""dew: a small class-conditional diffusion model that draws handwritten digits of 8 x 8 pixels.

A transformer over patches whose norms are modulated by time and label (adaLN-Zero: Scalable Diffusion Models with
Transformers, Peebles and Xie, 2022, https://arxiv.org/abs/2212.09748), trained by flow matching on straight paths (Flow
Matching for Generative Modeling, Lipman et al., 2022, https://arxiv.org/abs/2210.02747):

    x(t) = (1 - t) noise + t image,   v(x, t, label) ~ d x(t) / dt = image - noise,   t from 0 (noise) to 1 (image)

Images are [batch, 1, 8, 8] from -1 (black) to 1 (white). The recipe is `bases/dew.py` in the repository.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel


class DewConfig(PretrainedConfig):
    """Sizes of the model.

    image_size, patch_size, num_channels  of the images and of the squares that become tokens, in pixels
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size  of the transformer
    label_dropout  share of the labels that training replaces by none, for classifier-free guidance
    """

    model_type = "dew"

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        num_channels: int = 1,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 512,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        label_dropout: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.layer_norm_eps, self.initializer_range = layer_norm_eps, initializer_range
        self.label_dropout = label_dropout


class DewTime(nn.Module):
    """Time [batch] from 0 to 1 as [batch, hidden_size]: sines and cosines of 1000 t, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        count = self.width // 2
        steps = torch.arange(count, device=time.device, dtype=torch.float32) / count
        angles = 1000 * time.float()[:, None] * torch.exp(-math.log(10000) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class DewAttention(nn.Module):
    """Self-attention over all patches: [batch, patches, hidden_size] to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (
            m(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DewMLP(nn.Module):
    """fc2(gelu(fc1(x)))"""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class DewBlock(nn.Module):
    """h + gate attention(modulated norm(h)), then the same with the MLP; `modulation` of the condition gives both."""

    def __init__(self, config: DewConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps) for _ in range(2))
        self.attention = DewAttention(width, config.num_attention_heads)
        self.mlp = DewMLP(width, config.intermediate_size)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        hidden = hidden + gate1 * self.attention(self.norm1(hidden) * (1 + scale1) + shift1)
        return hidden + gate2 * self.mlp(self.norm2(hidden) * (1 + scale2) + shift2)


class DewForImageGeneration(PreTrainedModel):
    """The velocity of the flow from noise to images, and the sampler that follows it.

        c = silu(time(t) + label_embedding(label))
        v = patches to image(projection(modulated norm(blocks(patch_embedding(x) + position_embedding, c))))

    A label of `config.num_labels` stands for none. At the start `modulation` and `projection` are zero, and so is v.
    """

    config_class = DewConfig
    main_input_name = "pixel_values"
    config: Any

    def __init__(self, config: DewConfig):
        super().__init__(config)
        width, patch = config.hidden_size, config.num_channels * config.patch_size**2
        self.time_embedding = DewTime(width)
        self.label_embedding = nn.Embedding(self.config.num_labels + 1, width)
        self.patch_embedding = nn.Linear(patch, width)
        self.position_embedding = nn.Parameter(torch.zeros(1, (config.image_size // config.patch_size) ** 2, width))
        self.blocks = nn.ModuleList(DewBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, patch)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        spread = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=spread)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.normal_(self.position_embedding, std=spread)
        zero: list[Any] = [self.projection, self.modulation, *(block.modulation for block in self.blocks)]
        if isinstance(module, nn.Linear) and module in zero:
            nn.init.zeros_(module.weight)

    def forward(self, pixel_values: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The velocity, [batch, channels, size, size] like `pixel_values`, at the times and for the labels [batch]."""
        size = self.config.patch_size
        condition = F.silu(self.time_embedding(time) + self.label_embedding(labels))
        rows = F.pixel_unshuffle(pixel_values, size).flatten(2).transpose(1, 2).to(condition.dtype)
        hidden = self.patch_embedding(rows) + self.position_embedding
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        rows = self.projection(self.norm(hidden) * (1 + scale) + shift).transpose(1, 2)
        return F.pixel_shuffle(rows.unflatten(2, (self.config.image_size // size,) * 2), size)

    @torch.no_grad()
    def flow(self, noise: Tensor, labels: Tensor, *, steps: int = 32, guidance: float = 1.0) -> Tensor:
        """Where the flow takes `noise` [batch, channels, size, size] from t = 0 to 1, in fp32: Heun's method.

        steps     of equal length; each computes the velocity twice, at its beginning and where Euler's step ends
        guidance  g in v(x, t, none) + g (v(x, t, label) - v(x, t, none)); 1 is the model as it is (Classifier-Free
                  Diffusion Guidance, Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598)
        """
        none = torch.full_like(labels, self.config.num_labels)

        def velocity(x: Tensor, t: float) -> Tensor:
            time = torch.full((len(x),), t, device=x.device)
            v = self(x, time, labels).float()
            if guidance == 1:
                return v
            free = self(x, time, none).float()
            return free + guidance * (v - free)

        x = noise.float()
        for i in range(steps):
            t, end = i / steps, (i + 1) / steps
            slope = velocity(x, t)
            x = x + (slope + velocity(x + slope / steps, end)) / (2 * steps)
        return x

    def sample(
        self, labels: Tensor, *, steps: int = 32, guidance: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One image for each of the labels [batch]: [batch, channels, size, size] from -1 to 1; see `flow`.

        The noise comes from `generator`, of the CPU, on whichever device the model is; without one from torch's own.
        """
        size = self.config.image_size
        noise = torch.randn(len(labels), self.config.num_channels, size, size, generator=generator)
        place = self.position_embedding.device
        return self.flow(noise.to(place), labels.to(place), steps=steps, guidance=guidance).clamp(-1, 1)
