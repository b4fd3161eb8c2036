"""Every default of every detector with the value that its paper or the authors' code states, and what is our own.

The values were written from the papers and the authors' public code, not from the detectors.
"""

from typing import Any

# By parameter: value. A size is (height, width) in px and is that of `preset: paper`.
PUBLISHED: dict[str, dict[str, Any]] = {
    # ByChelsea/VAND-APRIL-GAN, train.sh and test_zero_shot.sh: OpenAI's ViT-L/14-336 at 518 px, blocks 6, 12, 18, 24,
    # softmax of 100 times the cosine, focal loss with gamma 2, Adam at 1e-3, 8 images; on VisA 15 epochs, no mosaics
    "aprilgan": {
        "image_size": (518, 518),
        "clip_model": "ViT-L-14-336",
        "weights": "openai",
        "layers": (6, 12, 18, 24),
        "temperature": 0.01,
        "focal_gamma": 2.0,
        "epochs": 15,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "mosaic_ratio": 0.0,
    },
    # arXiv 2107.12571 (sec. 5.1) and gudovskiy/cflow-ad: 8 coupling layers, P = 128, clamp 1.9, fibres of 256
    # positions, 25 meta-epochs of 8 passes, 2 of them warming up, Adam at 2e-4, rotations by up to 5 degrees
    "cflow": {
        "image_size": (256, 256),
        "backbone": "wide_resnet50_2",
        "layers": ("layer2", "layer3", "layer4"),
        "n_flows": 8,
        "clamp": 1.9,
        "position_dims": 128,
        "mixing": "rotation",
        "epochs": 25,
        "sub_epochs": 8,
        "warm_up_epochs": 2,
        "batch_size": 32,
        "fibre_batch": 256,
        "learning_rate": 2e-4,
        "turn_degrees": 5.0,
    },
    # arXiv 2104.04015 (appendix): SGD 0.03, momentum 0.9, weight decay 3e-5, 256 epochs of 256 steps, 96 images for
    # 3-way
    "cutpaste": {
        "image_size": (256, 256),
        "backbone": "resnet18",
        "augment_type": "3way",
        "epochs": 256,
        "steps_per_epoch": 256,
        "batch_size": 96,
        "learning_rate": 0.03,
        "momentum": 0.9,
        "weight_decay": 3e-5,
        "area_ratio": (0.02, 0.15),
        "aspect_ratio": (0.3, 3.3),
        "scar_width_px": (2, 16),
        "scar_length_px": (10, 25),
        "scar_degrees": 45,
        "jitter": 0.1,
        "patch_size_px": 32,
        "patch_stride_px": 4,
    },
    # arXiv 2108.00462 (sec. 4) and choubo/deviation-network-image: top 10 % of patches, two scales, 5,000 draws of the
    # prior, margin 5, 50 epochs of 20 steps of 48 images, Adam at 2e-4
    "devnet": {
        "image_size": (448, 448),
        "backbone": "resnet18",
        "margin": 5.0,
        "top_ratio": 0.1,
        "num_scales": 2,
        "prior_draws": 5000,
        "epochs": 50,
        "steps_per_epoch": 20,
        "batch_size": 48,
        "learning_rate": 2e-4,
        "weight_decay": 1e-5,
        "decay_epochs": 10,
        "max_gradient_norm": 1.0,
        "turn_degrees": 180.0,
    },
    # arXiv 2008.12577 (sec. 4.2) and marco-rudolph/differnet: AlexNet at 448, 224 and 112 px, 8 coupling blocks of
    # 2,048, clamp 3, 192 epochs, 4 transforms in training, 64 in scoring, Adam at 2e-4
    "differnet": {
        "image_size": (448, 448),
        "backbone": "alexnet",
        "batch_size": 24,
        "smoothing_sigma": 3.0,
        "head": "flow",
        "num_scales": 3,
        "n_flows": 8,
        "clamp": 3.0,
        "hidden_dims": 2048,
        "train_transforms": 4,
        "test_transforms": 64,
        "max_degrees": 180,
        "epochs": 192,
        "learning_rate": 2e-4,
        "weight_decay": 1e-5,
    },
    # arXiv 2108.07610 (sec. 4) and VitjanZ/DRAEM
    "draem": {
        "image_size": (256, 256),
        "base_width": 128,
        "anomalous_ratio": 0.5,
        "turned_ratio": 0.3,
        "ssim_weight": 1.0,
        "epochs": 700,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "smoothing_px": 21,
    },
    # arXiv 2111.07677 (sec. 4.2 and tab. 5): 8 steps for ResNets, alternating kernels, 500 epochs, Adam at 1e-3,
    # weight decay 1e-5
    "fastflow": {
        "image_size": (256, 256),
        "backbone": "wide_resnet50_2",
        "layers": ("layer1", "layer2", "layer3"),
        "n_flow_steps": 8,
        "conv3x3_only": False,
        "hidden_ratio": 1.0,
        "epochs": 500,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 1e-5,
    },
    # arXiv 2205.00908 (secs. 3 and 4) and TooTouch/MemSeg: 30 images in memory, lambda 0.6 and 0.4, 5,000 steps of 8
    # images
    "memseg": {
        "image_size": (256, 256),
        "backbone": "resnet18",
        "layers": ("layer1", "layer2", "layer3"),
        "memory_size": 30,
        "k_neighbors": 1,
        "anomalous_ratio": 0.5,
        "l1_weight": 0.6,
        "focal_weight": 0.4,
        "training_steps": 5000,
        "batch_size": 8,
        "learning_rate": 0.003,
        "last_learning_rate": 1e-4,
        "weight_decay": 5e-4,
        "top_pixels": 100,
    },
    # arXiv 2106.08265 (secs. 3 and 4): WRN50 at 224 of 256 px, levels 2 and 3, coreset of 10 %, sigma 4;
    # amazon-science/patchcore-inspection: embeddings of 1,024 dims, which only `preset: paper` has
    "patchcore": {
        "image_size": (224, 224),
        "backbone": "wide_resnet50_2",
        "layers": ("layer2", "layer3"),
        "embedding_dims": 1024,
        "coreset_sampling_ratio": 0.1,
        "smoothing_sigma": 4.0,
    },
    # arXiv 2303.02595 (sec. 4) and gasharper/PyramidFlow: ResNet-18 at 1,024 px, 4 stacks, Adam at 2e-4, weight decay
    # 1e-5, 15 epochs of pairs
    "pyramidflow": {
        "image_size": (1024, 1024),
        "backbone": "resnet18",
        "channels": 16,
        "stacks": 4,
        "kernel_size": 7,
        "epochs": 15,
        "batch_size": 2,
        "learning_rate": 2e-4,
        "weight_decay": 1e-5,
    },
    # CVPR 2023 and tientrandinh/Revisiting-Reverse-Distillation; CVPR 2022 (arXiv 2201.10703): WRN50 at 256 px,
    # sigma 4, Adam at 5e-3 and 1e-3 for projectors, two batches of 16, lambda 0.2, noise x 0.2, 200 epochs (RD)
    "reverse_distillation_pp": {
        "image_size": (256, 256),
        "backbone": "wide_resnet50_2",
        "projector": True,
        "projector_weight": 0.2,
        "ssot_weight": 0.0,
        "noise_strength": 0.2,
        "epochs": 200,
        "batch_size": 32,
        "learning_rate": 5e-3,
        "projector_learning_rate": 1e-3,
        "smoothing_sigma": 4.0,
    },
    # arXiv 2207.07361 (sec. 4) and MediaBrain-SJTU/RegAD: ResNet-18 to layer3 at 224 px, SGD at 1e-4 with momentum 0.9,
    # 50 epochs of batches of 32, sigma 4
    "regad": {
        "image_size": (224, 224),
        "backbone": "resnet18",
        "epochs": 50,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "momentum": 0.9,
        "smoothing_sigma": 4.0,
    },
    # Pattern Recognition 112 (2021), secs. 3 and 4: k in {2, 4, 8, 16}, three sets, 300 epochs, Adam at 1e-4
    "riad": {
        "image_size": (256, 256),
        "grid_size": (2, 4, 8, 16),
        "num_sets": 3,
        "ssim_weight": 1.0,
        "msgms_weight": 1.0,
        "epochs": 300,
        "learning_rate": 1e-4,
        "smoothing_px": 21,
    },
    # arXiv 2303.15140 (sec. 4.3) and DonaldRR/SimpleNet
    "simplenet": {
        "image_size": (224, 224),
        "backbone": "wide_resnet50_2",
        "layers": ("layer2", "layer3"),
        "embedding_dims": 1536,
        "hidden_dims": 1024,
        "noise_sigma": 0.015,
        "margin": 0.5,
        "epochs": 160,
        "batch_size": 4,
        "adaptor_learning_rate": 1e-4,
        "learning_rate": 2e-4,
        "weight_decay": 1e-5,
        "smoothing_sigma": 4.0,
    },
    # arXiv 2005.02357 (sec. 4.1): WRN50 at 224 of 256 px, K = 50, sigma 4
    "spade": {
        "image_size": (224, 224),
        "backbone": "wide_resnet50_2",
        "feature_levels": ("layer1", "layer2", "layer3"),
        "k_neighbors": 50,
        "align": False,
        "image_score": "pooled",
        "smoothing_sigma": 4.0,
    },
    # arXiv 2103.04257 (sec. 4.1): SGD 0.4, momentum 0.9, weight decay 1e-4, 100 epochs of batches of 32
    "stfpm": {
        "image_size": (256, 256),
        "backbone": "resnet18",
        "layers": ("layer1", "layer2", "layer3"),
        "epochs": 100,
        "batch_size": 32,
        "learning_rate": 0.4,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    },
    # arXiv 2206.03687 (secs. 3 and 4) and zhiyuanyou/UniAD: EfficientNet-B4 at stride 16, 4 + 4 layers of 256, 8
    # heads, 7 x 7 neighbours, jitter of 20, AdamW at 1e-4, 1,000 epochs of batches of 8, gradients clipped at 0.1
    "uniad": {
        "image_size": (224, 224),
        "backbone": "efficientnet_b4",
        "token_px": 16,
        "neighbor_size": 7,
        "hidden_dims": 256,
        "n_heads": 8,
        "n_encoder_layers": 4,
        "n_decoder_layers": 4,
        "feedforward_dims": 1024,
        "dropout": 0.1,
        "jitter_scale": 20.0,
        "epochs": 1000,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "max_gradient_norm": 0.1,
        "pooling_px": 16,
    },
    # arXiv 2303.14814 (secs. 4 and 5): ViT-B/16+ of LAION-400M at 240 px, windows of 2 x 2 and 3 x 3 patches
    "winclip": {
        "image_size": (240, 240),
        "clip_model": "ViT-B-16-plus-240",
        "weights": "laion400m_e32",
        "scales": (2, 3),
        "temperature": 0.07,
    },
}

# Parameters that no paper states a value for: how it is run, another variant than the published one, or a choice of
# ours.
OURS: dict[str, set[str]] = {
    "aprilgan": {"k_shot", "class_name", "prompts_normal", "prompts_anomalous", "keep_text_tower"},
    "cflow": set(),
    "cutpaste": {"last_layer", "pretrained", "level", "head_dims", "shift_ratio", "smoothing_sigma"},
    "devnet": {"last_layer", "hidden_dims", "map", "smoothing_sigma"},
    "differnet": {
        "layers",
        "k_neighbors",
        "train_difference",
        "coreset_sampling_ratio",
        "difference_epochs",
        "difference_rate",
    },
    "draem": {"textures"},
    "fastflow": {"clamp"},
    "memseg": {"stem", "deepest_layer", "feature_dim", "textures", "texture_ratio", "foreground", "epochs"},
    "patchcore": {"max_bank_vectors", "coreset_mode", "projected_dims", "n_neighbors", "search"},
    "pyramidflow": {"levels", "volume_norm"},  # the authors choose both for each category
    "reverse_distillation_pp": {"ssot_partners"},
    "regad": {"k_shot"},  # the paper has 2, 4 and 8
    "riad": {"backbone", "layers", "base_width", "batch_size", "weight_decay"},
    "simplenet": set(),
    "spade": {"pooled_level", "level_fusion", "max_gallery_images"},
    "stfpm": set(),
    "uniad": {"layers"},  # the stages of the paper's backbone, by torchvision's names
    "winclip": {
        "window_size",
        "k_shot",
        "norm_patches",
        "class_name",
        "prompts_normal",
        "prompts_anomalous",
        "keep_text_tower",
    },
}
COMMON = {"precision", "weights"}
