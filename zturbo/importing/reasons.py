"""Why settings of other trainers have no counterpart, or need none: what a line says of them."""

PREVIEWED = "previews are drawn as turbo is used: 8 steps, CFG 1, no negative prompt"
NO_OFFSET = "there is no noise offset here; the velocity is learnt from plain noise"
UNDISTILLED = (
    "an undistilled model needs no adapter; its previews are drawn by turbo in ComfyUI's graph only, with the turbo "
    "model in preview_model"
)
STRAIGHT = "without an adapter turbo wears off sooner; give it with --adapter"
PRESERVE = "there is no such loss here; regularisation pictures and keep_turbo (guard, restore) serve the same end"
FILE_DECIDES = "the file decides: give an fp8, int8 or nvfp4 file as --model"
OFFLOAD = "weights that do not fit the card come and go by themselves; keep_layers 0 takes least memory"
ALWAYS = "always so here"
CACHED = "latents and captions are always encoded once and kept (data.cache)"
NO_UPLOAD = "nothing is sent anywhere"
BY_TAGS = "captions are dropped whole, not by tags (data.caption_dropout)"
NEUTRAL = {"network_weight": 1, "loss_multiplier": 1, "noise_multiplier": 1}  # values that change nothing
FOLDER = "run folders lie in zturbo_runs, or where --runs says"
TOOLKIT = {
    "training_folder": FOLDER,
    "device": "choose with --device",
    "performance_log_every": "time and memory are always logged",
    "sqlite_db_path": "there is no database",
    "log_every": "every step is logged",
    "use_ui_logger": "every step is logged",
    "use_wandb": NO_UPLOAD,
    "push_to_hub": NO_UPLOAD,
    "hf_repo_id": NO_UPLOAD,
    "hf_private": NO_UPLOAD,
    "save_format": "one form, which ComfyUI, diffusers and ai-toolkit read",
    "conv": "Z-Image has no convolutions to train",
    "conv_alpha": "Z-Image has no convolutions to train",
    "dropout": "there is no dropout in the LoRA here",
    "transformer_only": ALWAYS,
    "old_lokr_format": "files are written as ComfyUI reads them",
    "train_unet": ALWAYS,
    "train_text_encoder": "the text encoder is not trained here",
    "noise_scheduler": "flow matching, as always here",
    "bypass_guidance_embedding": "Z-Image has none",
    "unload_text_encoder": "it is unloaded by itself once the captions are encoded",
    "cache_text_embeddings": CACHED,
    "cache_latents": CACHED,
    "cache_latents_to_disk": CACHED,
    "skip_first_sample": "nothing is drawn before the first step here",
    "force_first_sample": "nothing is drawn before the first step here",
    "linear_timesteps": "its bell of loss weights is not here; loss.weighting cosmap also weighs the middle more",
    "linear_timesteps2": "its bell of loss weights is not here; loss.weighting cosmap also weighs the middle more",
    "min_snr_gamma": "that belongs to noise prediction; flow matching has none",
    "snr_gamma": "that belongs to noise prediction; flow matching has none",
    "diff_output_preservation": PRESERVE,
    "diff_output_preservation_multiplier": PRESERVE,
    "diff_output_preservation_class": PRESERVE,
    "blank_prompt_preservation": PRESERVE,
    "blank_prompt_preservation_multiplier": PRESERVE,
    "differential_guidance_scale": "do_differential_guidance is off",
    "do_guidance_loss": "there is no such loss here",
    "switch_boundary_every": "Z-Image is one stage",
    "quantize": FILE_DECIDES,
    "qtype": FILE_DECIDES,
    "quantize_te": "the file decides: give an fp8 file as --text-encoder",
    "qtype_te": "the file decides: give an fp8 file as --text-encoder",
    "low_vram": OFFLOAD,
    "layer_offloading": OFFLOAD,
    "layer_offloading_transformer_percent": OFFLOAD,
    "layer_offloading_text_encoder_percent": OFFLOAD,
    "compile": "compute.compile is auto",
    "block_compile": "compute.compile is auto",
    "extras_name_or_path": "give --text-encoder and --vae",
    "te_name_or_path": "give --text-encoder",
    "vae_path": "give --vae",
    "sampler": PREVIEWED,
    "guidance_scale": PREVIEWED,
    "neg": PREVIEWED,
    "sample_steps": f"{PREVIEWED} (9 there are 8 here: the last one does nothing)",
    "walk_seed": "one seed for all previews here",
    "sample_start_step": "previews begin with the first multiple of previews.every",
    "caption_ext": "captions are .txt or .caption",
    "default_caption": "a picture without a caption has the trigger word for one",
    "num_workers": "pictures are encoded once, before training",
    "buckets": ALWAYS,
    "bucket_tolerance": "sizes are multiples of 16",
    "mask_path": "put the masks into a folder masks beside the pictures, under the same names",
    "invert_mask": "white counts; turn the masks round",
    "flip_y": "pictures are mirrored left to right only (data.flip)",
    **dict.fromkeys(("token_dropout_rate", "keep_tokens"), BY_TAGS),
    "random_crop": "pictures are cropped in the middle, once",
    "random_scale": "pictures are scaled once",
    "network_weight": "all sets count alike; repeat a folder instead",
    "loss_multiplier": "all sets count alike; repeat a folder instead",
    "prior_reg": "regularisation pictures are trained as they are",
    "num_frames": "Z-Image draws pictures",
    "shrink_video_to_frames": "Z-Image draws pictures",
}
TOOLKIT_NOISE = dict.fromkeys(("noise_offset", "dynamic_noise_offset", "random_noise_shift"), NO_OFFSET)
METADATA = ("image_jsonl_file", "metadata_file", "in_json")
VIDEOS = ("video_directory", "video_jsonl_file")
SIZES = "sizes are multiples of 16 in each picture's own shape"
SETS = {
    "caption_extension": "captions are .txt or .caption",
    "class_tokens": "a picture without a caption has the trigger word for one: set inputs.trigger",
    **dict.fromkeys(("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), SIZES),
    **dict.fromkeys(("caption_prefix", "caption_suffix"), "write it into the captions"),
    **dict.fromkeys(("caption_separator", "keep_tokens_separator", "secondary_separator"), "tags are parted by commas"),
    "enable_wildcard": "captions are taken as they are",
    **dict.fromkeys(("color_aug", "random_crop", "face_crop_aug_range"), "pictures are encoded once, as they are"),
    "caption_tag_dropout_rate": BY_TAGS,
    "caption_dropout_every_n_epochs": "captions are dropped by chance (data.caption_dropout)",
    "control_directory": "Z-Image takes no control pictures",
    "conditioning_data_dir": "put the masks into a folder masks beside the pictures, under the same names",
    "resize_interpolation": "pictures are scaled one way",
    **dict.fromkeys(
        METADATA, "captions in one file are read from metadata.jsonl in the pictures' folder: put it there, so named"
    ),
    **dict.fromkeys(VIDEOS, "films are not trained on"),
}
LAUNCH = "how a step is computed is chosen by itself (attention, compiling, workers)"
LOGS = "each run's log lies in its folder; TensorBoard's file where that is installed"
STATE = "a checkpoint always holds all that a run needs to go on"
PATTERNS = "these are regular expressions; network.targets takes names with *, as *.to_q"
KOHYA = {
    **dict.fromkeys(("sdpa", "xformers", "flash_attn", "flash3", "sage_attn", "split_attn", "mem_eff_attn"), LAUNCH),
    **dict.fromkeys(("max_data_loader_n_workers", "persistent_data_loader_workers", "cuda_allow_tf32"), LAUNCH),
    **dict.fromkeys(("compile", "torch_compile", "dynamo_backend", "dynamo_mode", "use_32bit_attention"), LAUNCH),
    **dict.fromkeys(("logging_dir", "log_with", "log_prefix", "log_tracker_name", "wandb_run_name"), LOGS),
    **dict.fromkeys(("save_state", "save_state_on_train_end", "save_last_n_steps_state"), STATE),
    **dict.fromkeys(("huggingface_repo_id", "huggingface_token", "wandb_api_key", "async_upload"), NO_UPLOAD),
    **dict.fromkeys(("fp8_base", "fp8_scaled", "fp8_base_unet"), FILE_DECIDES),
    "fp8_llm": "the file decides: give an fp8 file as --text-encoder",
    **dict.fromkeys(("blocks_to_swap", "gradient_checkpointing_cpu_offload", "lowram", "highvram"), OFFLOAD),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs"), CACHED),
    **dict.fromkeys(("cache_text_encoder_outputs_to_disk", "vae_batch_size", "cache_info", "skip_cache_check"), CACHED),
    "cache_directory": "encoded pictures lie in .cache beside the runs",
    **dict.fromkeys(("full_bf16", "full_fp16"), "the LoRA is always trained in fp32"),
    "network_dropout": "there is no dropout in the LoRA here",
    "scale_weight_norms": "the LoRA's length is not limited here",
    "network_train_unet_only": ALWAYS,
    "dim_from_weights": "set network.rank to at least the rank of network.start",
    "text_encoder_lr": "the text encoder is not trained here",
    "output_dir": "run folders lie in zturbo_runs, or where --runs says",
    "save_model_as": "LoRAs are safetensors",
    "training_comment": "there is no such comment; the recipe stands in the LoRA's metadata",
    "no_metadata": "the recipe stands in the LoRA's metadata",
    "resume": "give --resume with the name of a run",
    "sample_at_first": "nothing is drawn before the first step here",
    "sample_sampler": PREVIEWED,
    "guidance_scale": PREVIEWED,
    "min_snr_gamma": "that belongs to noise prediction; flow matching has none",
    "lr_decay_steps": "taken by no course that is here",
    "lr_scheduler_power": "taken by no course that is here",
    "lr_scheduler_min_lr_ratio": "rates fall to 0 here",
    "preserve_distribution_shape": "noise levels are squeezed into the range, not cut to it",
    "num_timestep_buckets": "noise levels are drawn one by one",
    "model_prediction_type": "the velocity is learnt, as always here",
    "mode_scale": "there is no such choice of noise levels here",
    "max_token_length": "captions have up to 512 tokens",
    "clip_skip": "Z-Image's text encoder has no such setting",
    "masked_loss": "masks that lie beside the pictures are always taken (data.masks)",
    "huber_schedule": "huber bends at the same place at all noise levels",
    "dataset_class": "nothing runs from a file",
    "network_module": ALWAYS,
    **SETS,
}
KOHYA_NOISE = {
    **dict.fromkeys(("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength"), NO_OFFSET),
    **dict.fromkeys(("multires_noise_iterations", "multires_noise_discount"), NO_OFFSET),
    **dict.fromkeys(("ip_noise_gamma", "ip_noise_gamma_random_strength"), NO_OFFSET),
}
