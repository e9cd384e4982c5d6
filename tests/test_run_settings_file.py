"""run/settings_file.py: files of settings, ours and other programs', read as command lines."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from foreign.terminal import Complaints, printable
from run.config import answer_mistakes, read_given
from run.known_names import ELSEWHERE

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
  - q_proj
  - v_proj
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
early_stopping_patience:
logging_steps: 1
flash_attention: true
warmup_steps: 10
saves_per_epoch: 1
weight_decay: 0.0
deepspeed:
fsdp:
special_tokens:
"""
FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: alpaca.json
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""


def read(folder: Path, text: str, name: str = "recipe.yaml", flags: str = "") -> dict[str, Any]:
    path = folder / name
    path.write_text(text)
    return read_given(["--config", str(path), *flags.split()])


def test_a_file_of_axolotl_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, AXOLOTL) == {
        "model": "NousResearch/Meta-Llama-3-8B",
        "quant": "nf4",
        "eval_fraction": 0.05,
        "output": "./outputs/qlora",
        "max_length": 4096,
        "packing": True,
        "lora_r": 32,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "target_modules": "q_proj,v_proj",
        "gradient_accumulation_steps": 4,
        "batch_size": 2,
        "epochs": 4.0,
        "optim": "paged_adamw_32bit",
        "lr_scheduler": "cosine",
        "learning_rate": 2e-4,
        "train_on": "completions",
        "group_by_length": False,
        "dtype": "auto",
        "logging_steps": 1,
        "warmup_steps": 10,
        "warmup_ratio": 0.0,
        "save_steps": -1,
        "weight_decay": 0.0,
    }


def test_a_file_of_llama_factory_is_read(tmp_path: Path) -> None:
    given = read(tmp_path, FACTORY)
    assert given["model"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (given["target_modules"], given["report_to"]) == ("all-linear", "")
    assert (given["learning_rate"], given["epochs"], given["dtype"]) == (1e-4, 3.0, "bfloat16")
    assert (given["eval_steps"], given["save_steps"]) == (500, 500)
    assert len(given) == 21


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings.json", '{"learning_rate": 2e-4, "lora_target": ["q_proj"], "resume": null}'),
        ("settings", ' {"learning-rate": 0.0002, "lora_target": "q_proj"}'[1:]),
        ("settings.yml", "{learning_rate: 2e-4, lora_target: [q_proj]}"),
        ("settings.txt", "lr: 2e-4\nlora-target: [q_proj]\nresume:\n"),
    ],
)
def test_json_and_yaml_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    assert read(tmp_path, text, name) == {"learning_rate": 2e-4, "target_modules": "q_proj"}


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("dtype: bf16", "dtype", "bfloat16"),
        ("max_memory: 24", "max_memory", "24"),
        ("packing: no", "packing", False),
        ("packing: on", "packing", True),
        ("no-shuffle: true", "shuffle", False),
        ("push_to_hub: 012", "push_to_hub", "012"),
        ("sample_prompt: '- a: \"b\" = --c'", "sample_prompt", '- a: "b" = --c'),
        ("sample_prompt: ''", "sample_prompt", ""),
        ("max_steps: -1", "max_steps", -1),
        ("eval_strategy: no", "eval_steps", 0),
        ("save_steps: epoch", "save_steps", -1),
        ("resume: true", "resume", "auto"),
    ],
)
def test_a_value_is_read_as_on_the_command_line(
    tmp_path: Path, setting: str, field: str, value: object
) -> None:
    assert read(tmp_path, setting) == {field: value}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lerning_rate: 1", "lerning_rate is unknown: did you mean --learning-rate?"),
        ("lora_rnk: 1", "lora_rnk is unknown: did you mean --lora-r"),
        ("config: other.yaml", "config is unknown"),
        ("help: true", "help is unknown"),
        ("dtype: fp8", "dtype: invalid choice: 'fp8'"),
        ("batch_size: 2.5", "batch-size: must be a whole number: got '2.5'"),
        ("packing: 7", "packing must be left bare, or be true or false: got '7'"),
        ("roles: {a: b}", "roles is unknown"),
        ("datasets:\n- path: a\n  type: alpaca", "datasets: give --data"),
        ("model: [a, b]", "model must be one value: got a list"),
        ("model: {a: b}", "model must be one value: got names or lists inside it"),
        ("target_modules: [[a]]", "target_modules must be one value: got names or lists inside"),
        ("lr: 1\nlearning_rate: 2", "lr (1) and --learning-rate (2) contradict each other"),
        ("lora-r: 1\nlora_r: 2", "lora_r must be given once: got it with _ and with -"),
        (
            "save_strategy: epoch\nsave_steps: 9",
            "(epoch) and --save-steps (9) contradict each other",
        ),
        ("fp16: false", "fp16 false does not say enough: give --dtype, too"),
        (
            ": 1",
            "mapping expected <block end>, but found ':' in line 1",
        ),
        ("'': 1", "must have the name of a flag before each colon: got ''"),
        # slips whose value would be lost, or read as that of another flag
        ("learning_rate 1e-4:", "before each colon: got 'learning_rate 1e-4'"),
        ("seed=5 --lr: 1", "before each colon: got 'seed=5 --lr'"),
        ("model my: true", "before each colon: got 'model my'"),
        ("[" * 5000, "must be readable: got RecursionError"),
    ],
)
def test_what_a_setting_cannot_be_is_said_with_the_name_of_the_file(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml") as refused:
        read(tmp_path, text)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_settings_that_must_change_are_said_in_one_go(tmp_path: Path) -> None:
    text = """
        stage: dpo
        datasets:
          - path: a
            type: alpaca
        roles: {a: b}
        batch_size: many
    """
    with pytest.raises(Complaints, match=r"recipe\.yaml: 4 settings must change") as refused:
        read(tmp_path, dedent(text))
    assert printable(refused.value).splitlines()[1:] == [
        "  stage: leave it out, it is supervised fine-tuning",
        f"  datasets: {ELSEWHERE['--datasets']}",
        "  roles is unknown",
        "  batch-size: must be a whole number: got 'many' (samples, or packed rows, in a "
        "micro-batch)",
    ]


def test_a_refused_file_ends_the_process_with_its_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: dpo\nlerning_rate: 1")
    with pytest.raises(SystemExit) as ended:
        answer_mistakes(["--config", str(path)])
    head, *lines = str(ended.value.code).splitlines()
    assert head.startswith(f"error: {path}: 2 settings must change")
    assert len(lines) == 2
    answer_mistakes(["--lr", "1"])


def test_flags_override_the_file_also_by_their_counterpart(tmp_path: Path) -> None:
    text = "warmup_ratio: 0.1\nsave_strategy: epoch\nlora_r: 8"
    given = read(tmp_path, text, flags="--warmup-steps 5 --save_steps 50")
    expected = {"warmup_steps": 5, "warmup_ratio": 0.0, "save_steps": 50, "lora_r": 8}
    assert given == expected
    given = read(tmp_path, "warmup_steps: 5", flags="--warmup-ratio 0.1")
    assert given == {"warmup_steps": 0, "warmup_ratio": 0.1}
