"""UniAD: one transformer reconstructs the feature maps of images of many categories; what it cannot is anomalous.

A transformer that copied its input would reconstruct anomalies too. Tokens therefore do not see their neighbourhood,
every decoder layer starts from queries of its own, and training removes noise that was added to the features.

Source: You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, arXiv 2206.03687; where the paper
is silent, the authors' code ("code" below).
Differs from the paper: the last epoch is used, where the code keeps the one with the best pixel AUROC on the test
images. Batches of 8 images, as in the code on one GPU, where the paper has 64 on 8 GPUs at the same learning rate.
EfficientNet-B4 and its weights are torchvision's, where the code has a port of another implementation. Queries and
attention of each layer are initialised independently, where the code copies those of one layer.

Shapes: B images, C channels, h w grid of tokens, N = h * w tokens, D hidden dims, H W pixels.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.device_constants import sent_ahead
from raydetect.blocks.networks.attention import Attention, KeyedDropout, glorot, neighbor_mask
from raydetect.blocks.networks.unet import keyed_init
from raydetect.blocks.precision import in_float32
from raydetect.blocks.seeding import keyed_generator, keyed_seed
from raydetect.detectors._base import Batch, Detector, DetectorInfo, ImageSize, Scores, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone

BACKBONE, RECONSTRUCTION = "backbone", "reconstruction"
DECAY_AT, DECAY = 0.8, 0.1  # of the epochs, of the learning rate


class UniAD(NetworkDetector):
    """Distance between a feature map and its reconstruction by a transformer."""

    info = DetectorInfo(
        title="UniAD",
        paper="arXiv:2206.03687",
        venue="NeurIPS 2022",
        summary="one transformer reconstructs the features of many categories, and anomalies badly",
        published="MVTec AD, one model for 15 categories, EfficientNet-B4: 96.5 image AUROC, 96.8 pixel AUROC (paper, "
        "tables 1-2); 97.6, 97.0 on one GPU (code); 92.5, 95.8 in a re-run of 100 epochs at 256 px",
    )
    phases = ("train",)
    smoke: ClassVar = {
        **{"backbone": "resnet18", "layers": ("layer1", "layer2"), "image_size": (64, 64), "token_px": 8},
        **{"neighbor_size": 3, "hidden_dims": 64, "n_heads": 4, "n_encoder_layers": 1, "n_decoder_layers": 2},
        **{"feedforward_dims": 128, "epochs": 40, "learning_rate": 2e-3, "pooling_px": 4},
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of UniAD."""

        image_size: Annotated[
            ImageSize, Field(description="(height, width) in px that images are resized to (sec. 4.2)")
        ] = (224, 224)
        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 3.3)")] = "efficientnet_b4"
        layers: Annotated[
            tuple[str, ...],
            Field(min_length=1, description="concatenated levels: 24, 32, 56 and 160 channels (sec. 3.3)"),
        ] = ("features.1", "features.2", "features.3", "features.5")
        weights: WeightsName = "imagenet"
        token_px: Annotated[
            int, Field(ge=1, description="side of the square of the input that a token stands for, in px (sec. 3.3)")
        ] = 16
        neighbor_size: Annotated[
            int, Field(ge=1, description="side of the square around a token that it does not see, odd (sec. 3.2)")
        ] = 7
        hidden_dims: Annotated[int, Field(ge=2, multiple_of=2, description="width of a token (sec. 3.3)")] = 256
        n_heads: Annotated[int, Field(ge=1, description="of the attention (code)")] = 8
        n_encoder_layers: Annotated[int, Field(ge=1, description="layers of the encoder (sec. 3.3)")] = 4
        n_decoder_layers: Annotated[
            int, Field(ge=1, description="layers of the decoder, each with queries of its own (secs. 3.2, 3.3)")
        ] = 4
        feedforward_dims: Annotated[int, Field(ge=1, description="hidden width of the two-layer networks (code)")] = (
            1024
        )
        dropout: Annotated[float, Field(ge=0, lt=1, description="ratio of dropped values, in training (code)")] = 0.1
        jitter_scale: Annotated[
            float, Field(ge=0, description="alpha, noise added to all features in training (sec. 3.2; value: sec. 4.2)")
        ] = 20.0
        epochs: Annotated[int, Field(ge=1, description="passes over the images (sec. 4.2)")] = 1000
        batch_size: Annotated[int, Field(ge=1, description="images per step (code)")] = 8
        learning_rate: Annotated[
            float, Field(gt=0, description="of AdamW; divided by 10 after 4/5 of the epochs (sec. 4.2)")
        ] = 1e-4
        weight_decay: Annotated[float, Field(ge=0, description="of AdamW (sec. 4.2)")] = 1e-4
        max_gradient_norm: Annotated[float, Field(gt=0, description="larger gradients are scaled down (code)")] = 0.1
        pooling_px: Annotated[
            int,
            Field(
                ge=1, description="side of the mean filter; the image score is the maximum of the filtered map (code)"
            ),
        ] = 16

        def __post_init__(self) -> None:
            if self.neighbor_size % 2 == 0:
                raise ValueError(f"neighbor_size {self.neighbor_size} must be odd, so that the square has a centre")
            if self.hidden_dims % self.n_heads:
                raise ValueError(f"hidden_dims {self.hidden_dims} must be a multiple of n_heads {self.n_heads}")
            if max(self.grid()) <= self.neighbor_size:
                raise ValueError(
                    f"neighbor_size {self.neighbor_size} hides all of the {self.grid()} tokens of image_size "
                    f"{self.image_size} from the one in the centre; set a larger image_size, or a smaller token_px or "
                    "neighbor_size"
                )
            if self.pooling_px > min(self.image_size):
                raise ValueError(f"pooling_px {self.pooling_px} is larger than image_size {self.image_size}")

        def grid(self) -> tuple[int, int]:
            """(height, width) in tokens."""
            return -(-self.image_size[0] // self.token_px), -(-self.image_size[1] // self.token_px)

    params: Params

    def load_weights(self) -> str:
        """Loads the backbone."""
        p = self.params
        backbone, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone and reconstruction."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        return {BACKBONE: backbone, RECONSTRUCTION: self._reconstruction(backbone)}

    def _reconstruction(self, backbone: Backbone) -> "Reconstruction":
        """A new transformer for the feature maps of `image_size`."""
        channels = sum(shape[0] for shape in backbone.shapes(self.params.image_size))
        with keyed_init(self.seed, "uniad"):
            return Reconstruction(channels, self.params)

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new transformer, optimised by AdamW."""
        self.is_fitted = False
        p, backbone = self.params, self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        network = self._reconstruction(backbone).to(self.device).train()
        self.networks[RECONSTRUCTION] = network
        optimizer = torch.optim.AdamW(network.parameters(), p.learning_rate, weight_decay=p.weight_decay, fused=True)
        return TrainingPlan(
            network,
            optimizer,
            p.epochs,
            p.batch_size,
            rate=lambda done: DECAY if done >= DECAY_AT * p.epochs else 1.0,
            max_gradient_norm=p.max_gradient_norm,
        )

    def training_loss(self, piece: Batch) -> Tensor:
        """Mean squared error of the features reconstructed from jittered ones (sec. 3.1)."""
        with torch.no_grad():
            features_BChw = self._features(piece.images_BCHW)
            jittered_BChw = features_BChw + self._jitter(features_BChw, piece)
        seeds = [keyed_seed(self.seed, "dropout", key, piece.epoch) for key in piece.keys]
        drop = KeyedDropout(self.params.dropout, sent_ahead(torch.tensor(seeds), self.device))
        return F.mse_loss(self.run(self.networks[RECONSTRUCTION], jittered_BChw, drop), features_BChw)

    def end_training(self) -> None:
        """Freezes the transformer."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Distance of features and reconstruction (sec. 3.1); the score is the maximum of its local means (code).

        Raises:
            NotFittedError: the detector is not fitted.
            SpecError: the images are not of `image_size`; positions and queries are learned for its grid.
        """
        self.require_fitted()
        self.require_size(images_BCHW)
        features_BChw = self._features(images_BCHW)
        rebuilt_BChw = self.run(self.networks[RECONSTRUCTION], features_BChw, KeyedDropout())
        errors_B1hw = (rebuilt_BChw - features_BChw).square().sum(1, keepdim=True).sqrt()
        map_B1HW = resized(errors_B1hw, self.params.image_size)
        means = F.avg_pool2d(map_B1HW, self.params.pooling_px, 1)
        return Scores(means.flatten(1).amax(1), map_B1HW[:, 0])

    def _features(self, images_BCHW: Tensor) -> Tensor:
        """Concatenated levels on the grid of tokens, (B, C, h, w)."""
        levels = self.networks[BACKBONE](images_BCHW)
        return torch.cat([resized(level, self.params.grid()) for level in levels], 1).contiguous()

    def _jitter(self, features_BChw: Tensor, piece: Batch) -> Tensor:
        """Gaussian noise whose sigma is alpha times the norm of a position's features over C (sec. 3.2)."""
        shape = features_BChw.shape[1:]
        generators = (keyed_generator(self.seed, "jitter", key, piece.epoch) for key in piece.keys)
        noise_BChw = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sigma_B1hw = self.params.jitter_scale * features_BChw.norm(dim=1, keepdim=True) / shape[0]
        return sent_ahead(noise_BChw, self.device) * sigma_B1hw


def resized(maps_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, the centres of the corners aligned, as in the authors' code in both directions."""
    return F.interpolate(maps_BChw, size=size, mode="bilinear", align_corners=True)


class Reconstruction(nn.Module):
    """A transformer that reconstructs feature maps."""

    def __init__(self, channels: int, params: UniAD.Params) -> None:
        """Builds the network for feature maps of `channels` on the grid of `params`."""
        super().__init__()
        dims, self.grid = params.hidden_dims, params.grid()
        self.input, self.output = nn.Linear(channels, dims), nn.Linear(dims, channels)
        for layer in (self.input, self.output):
            glorot(layer)
        self.rows_hD = nn.Parameter(torch.empty(self.grid[0], dims // 2).uniform_())
        self.columns_wD = nn.Parameter(torch.empty(self.grid[1], dims // 2).uniform_())
        self.encoder = nn.ModuleList(EncoderLayer(params) for _ in range(params.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(params) for _ in range(params.n_decoder_layers))
        self.norm = nn.LayerNorm(dims)
        self.mask_NN: Tensor
        self.register_buffer("mask_NN", neighbor_mask(self.grid, params.neighbor_size), persistent=False)

    def forward(self, features_BChw: Tensor, drop: KeyedDropout) -> Tensor:
        """Reconstructed feature maps, (B, C, h, w) float32."""
        encoded_BND = self.input(features_BChw.flatten(2).transpose(1, 2))
        positions_ND = self.positions()
        for layer in self.encoder:
            encoded_BND = layer(encoded_BND, positions_ND, self.mask_NN, drop)
        decoded_BND = encoded_BND
        for layer in self.decoder:
            decoded_BND = layer(decoded_BND, encoded_BND, positions_ND, self.mask_NN, drop)
        rebuilt_BNC: Tensor = in_float32(self.output, self.norm(decoded_BND))
        return rebuilt_BNC.transpose(1, 2).unflatten(2, self.grid)

    def positions(self) -> Tensor:
        """Learned position of every token: first that of its column, then that of its row (code), (N, D)."""
        height, width = self.grid
        return torch.cat([self.columns_wD.repeat(height, 1), self.rows_hD.repeat_interleave(width, 0)], 1)


class FeedForward(nn.Module):
    """Two layers on every token, with a ReLU and dropout between them."""

    def __init__(self, params: UniAD.Params) -> None:
        """Builds the layers."""
        super().__init__()
        self.inner = nn.Linear(params.hidden_dims, params.feedforward_dims)
        self.outer = nn.Linear(params.feedforward_dims, params.hidden_dims)
        for layer in (self.inner, self.outer):
            glorot(layer)

    def forward(self, tokens_BND: Tensor, drop: KeyedDropout) -> Tensor:
        """Transformed tokens, (B, N, D)."""
        found: Tensor = self.outer(drop(self.inner(tokens_BND).relu()))
        return found


class EncoderLayer(nn.Module):
    """Attention to the tokens outside the neighbourhood, then two layers on every token, normalised after each."""

    def __init__(self, params: UniAD.Params) -> None:
        """Builds the layer."""
        super().__init__()
        self.attention = Attention(params.hidden_dims, params.n_heads)
        self.feed_forward = FeedForward(params)
        self.norms = nn.ModuleList(nn.LayerNorm(params.hidden_dims) for _ in range(2))

    def forward(self, tokens_BND: Tensor, positions_ND: Tensor, mask_NN: Tensor, drop: KeyedDropout) -> Tensor:
        """Encoded tokens, (B, N, D)."""
        placed_BND = tokens_BND + positions_ND
        seen_BND = self.attention(placed_BND, placed_BND, tokens_BND, mask_NN, drop)
        tokens_BND = self.norms[0](tokens_BND + drop(seen_BND))
        found: Tensor = self.norms[1](tokens_BND + drop(self.feed_forward(tokens_BND, drop)))
        return found


class DecoderLayer(nn.Module):
    """Queries of its own attend to the encoder's output, then to that of the layer before (sec. 3.2)."""

    def __init__(self, params: UniAD.Params) -> None:
        """Builds the layer."""
        super().__init__()
        height, width = params.grid()
        self.queries_ND = nn.Parameter(torch.empty(height * width, params.hidden_dims).normal_())
        self.of_encoder = Attention(params.hidden_dims, params.n_heads)
        self.of_layer = Attention(params.hidden_dims, params.n_heads)
        self.feed_forward = FeedForward(params)
        self.norms = nn.ModuleList(nn.LayerNorm(params.hidden_dims) for _ in range(3))

    def forward(
        self, before_BND: Tensor, encoded_BND: Tensor, positions_ND: Tensor, mask_NN: Tensor, drop: KeyedDropout
    ) -> Tensor:
        """Decoded tokens, (B, N, D); `before_BND` is the output of the layer before, or the encoder's."""
        found_BND = self.queries_ND.expand_as(encoded_BND)
        for attention, norm, seen_BND in (
            (self.of_encoder, self.norms[0], encoded_BND),
            (self.of_layer, self.norms[1], before_BND),
        ):
            values = attention(found_BND + positions_ND, seen_BND + positions_ND, seen_BND, mask_NN, drop)
            found_BND = norm(found_BND + drop(values))
        found: Tensor = self.norms[2](found_BND + drop(self.feed_forward(found_BND, drop)))
        return found
