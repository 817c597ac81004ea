"""Make the adapters of a run whole for others: a model card, the tokenizer, the template of the training.

    python tests/tools/publish.py runs/mine                    # forgetting.py does this at the end of a run
    python tests/tools/publish.py runs/mine --merged           # and merged/, base model and adapter in one, as --export
    hf upload you/name runs/mine/forgetting/seed-0             # or seed-0/merged
"""

import argparse, dataclasses, sys  # noqa: E401
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import Tokenizer, read_object, write_text  # noqa: E402
from forgetting import METHODS, UNLEARNING, VARIANT_OPTIONS, Options, method_of  # noqa: E402
from lora import load_adapter, merge_lora  # noqa: E402
from model import DTYPES, TEXT_FILES, checkpoint_folder, load_model, save_model  # noqa: E402


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first and loop.previtem['role'] == 'assistant' %}{{ '\\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def chat_template(tokenizer: Tokenizer) -> str:
    """render()'s template of conversations as jinja, for transformers' tokenizer.apply_chat_template."""
    puts_bos = tokenizer.bos is not None and tokenizer.encode(["x"])[0][0][0] == tokenizer.bos_id
    return ("{{ bos_token }}" if puts_bos else "") + CHAT_TEMPLATE


def publish_run(options: Options) -> None:
    """Publish every trained adapter of options.out; with options.export a merged checkpoint of each, too."""
    checkpoint = checkpoint_folder(options.model)
    tokenizer = Tokenizer(checkpoint)
    reference = Path(options.out) / "reference"
    if (reference / "adapter_model.safetensors").is_file():
        epochs = read_object(Path(options.out) / "config.json")["reference_epochs"]  # where the default depends on D_ref
        its_options = dataclasses.replace(options, lr=options.reference_lr, epochs=epochs, export=False)
        publish(reference, checkpoint, tokenizer, "reference", its_options)
    for weights in sorted(Path(options.out).glob("*/seed-*/adapter_model.safetensors")):
        folder, name = weights.parent, weights.parent.parent.name
        if name.partition(":")[0] in METHODS:
            publish(folder, checkpoint, tokenizer, name, method_of(name, options)[1])


def publish(folder: Path, checkpoint: Path, tokenizer: Tokenizer, name: str, options: Options) -> None:
    """One adapter folder; a model card that is there already is its owner's, and stays."""
    for file in filter(Path.is_file, (checkpoint / file for file in TEXT_FILES)):
        write_text(file.read_text(encoding="utf-8"), folder / file.name)
    write_text(chat_template(tokenizer), folder / "chat_template.jinja")
    if not (folder / "README.md").is_file():
        write_text(model_card(name, options), folder / "README.md")
    if options.export and not (folder / "merged" / "config.json").is_file():
        model = load_model(checkpoint, "cpu", DTYPES[options.dtype])
        load_adapter(model, folder)
        merge_lora(model)
        write_text(chat_template(tokenizer), folder / "merged" / "chat_template.jinja")
        save_model(model, folder / "merged")


def model_card(name: str, options: Options) -> str:
    """The README.md of an adapter, as the Hub reads it."""
    method = METHODS.get(name.partition(":")[0], METHODS["full"])  # the reference is trained as full is
    read = [key for key in VARIANT_OPTIONS if method.unlearn or key not in UNLEARNING]
    trained = {key: getattr(options, key) for key in read if getattr(options, key) is not None}
    trained["rho"] = method.rho if options.rho is None or method.rho == 1 else options.rho
    settings = "\n".join(f"- {key}: {value}" for key, value in trained.items())
    return (
        f"---\nbase_model: {options.model}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        "tags:\n- lora\n- forgetting\n- arxiv:2508.04329\n---\n\n"
        f"# {name}\n\nA LoRA adapter for {options.model}, trained by the method `{name}` of Forgetting "
        f"(arXiv 2508.04329) on {', '.join(options.data)}.\n\n{settings}\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--merged", action="store_true", help="also a checkpoint of base model and adapter in one")
    arguments = parser.parse_args()
    try:
        config = read_object(arguments.run / "config.json")
        fields = {field.name: config[field.name] for field in dataclasses.fields(Options) if field.name in config}
        publish_run(dataclasses.replace(Options(**fields), out=str(arguments.run), export=arguments.merged))
    except (ValueError, OSError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
