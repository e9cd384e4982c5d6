"""Flags of other trainers, by the names that their users know: which of ours each one is.

transformers' and TRL's command lines, PEFT's LoraConfig, Axolotl's and LLaMA-Factory's files and
Unsloth's functions, in the versions of November 2026. A name stands here only if it means the same
as ours; where it means something else, or where there is nothing to choose, the user is told.
"""

# with hyphens, as the command line has them after underscores are replaced
ALSO = {
    "--model-name-or-path": "--model",
    "--model-name": "--model",
    "--base-model": "--model",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--train-file": "--data",
    "--validation-file": "--eval-data",
    "--eval-dataset": "--eval-data",
    "--val-size": "--eval-fraction",
    "--val-set-size": "--eval-fraction",
    "--output-dir": "--output",
    "--max-seq-length": "--max-length",
    "--max-seq-len": "--max-length",
    "--sequence-len": "--max-length",
    "--cutoff-len": "--max-length",
    "--text-field": "--fields text=",
    "--dataset-text-field": "--fields text=",
    "--preprocessing-num-workers": "--dataset-num-proc",
    "--sample-packing": "--packing",
    "--lora-rank": "--lora-r",
    "--lora-target": "--target-modules",
    "--lora-target-modules": "--target-modules",
    "--per-device-train-batch-size": "--batch-size",
    "--micro-batch-size": "--batch-size",
    "--num-train-epochs": "--epochs",
    "--num-epochs": "--epochs",
    "--lr": "--learning-rate",
    "--lr-scheduler-type": "--lr-scheduler",
    "--optimizer": "--optim",
    "--hub-model-id": "--push-to-hub",
    "--bf16": "--dtype bfloat16",
    "--fp16": "--dtype float16",
    "--load-in-4bit": "--quant nf4",
    "--full-determinism": "--deterministic",
}
ELSEWHERE = {
    "--gradient-checkpointing": "leave it out, --activations auto recomputes where memory is "
    "short; --activations recompute always",
    "--resume-from-checkpoint": "give --resume with the run's folder",
    "--load-in-8bit": "weights are in NF4 or as they are stored: --quant nf4 or none",
    "--use-dora": "adapters are plain LoRA, or rsLoRA: --use-rslora",
    "--warmup-steps": "give --warmup-ratio, a share of all steps",
    "--assistant-only-loss": "leave it out, that is --train-on completions, the default",
    "--train-on-inputs": "give --train-on all",
    "--completion-only-loss": "leave it out, that is --train-on completions, the default",
    "--eval-strategy": "give --eval-steps",
    "--evaluation-strategy": "give --eval-steps",
    "--save-strategy": "give --save-steps",
    "--deepspeed": "start it with torchrun for several GPUs",
    "--fsdp": "start it with torchrun for several GPUs",
    "--flash-attn": "leave it out, the fastest exact attention is chosen",
    "--attn-implementation": "leave it out, the fastest exact attention is chosen",
    "--trust-remote-code": "leave it out, no code of a checkpoint is ever run",
    "--do-train": "leave it out",
    "--do-eval": "give --eval-data or --eval-fraction",
    "--use-peft": "leave it out, an adapter is what is trained",
    "--finetuning-type": "leave it out, an adapter is what is trained",
    "--stage": "leave it out, it is supervised fine-tuning",
}
