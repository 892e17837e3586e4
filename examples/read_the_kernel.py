"""From a spec to the text of its kernel: the algebra that was proven, the page, and the decode kernel itself."""

from kvdsl import Shape, load
from kvdsl.codegen import render
from kvdsl.codegen.plan import plan_for

SHAPE = Shape(head_dim=128, kv_heads=8, q_heads=32)


def main() -> None:
    plan = plan_for(load("kivi2"), SHAPE)
    for side in (plan.keys, plan.values):
        print(f"{side.name}: {side.form.definition}")
        for term in side.form.terms:
            print(f"    of the token {term.token_factor}, of the channel {term.channel_factor}, code: {term.coded}")
        for step in side.form.proof:
            print(f"    proven ({step.method}): {step.statement}")
    layout = plan.layout
    print(f"\na page: {layout.page_tokens} tokens, {layout.page_bytes} bytes, {layout.head_bytes} a head\n")

    text = render(plan, "triton", "kivi2")
    start = text.index("def decode(")
    print("\n".join(text[start:].split("\n")[:80]))
    print(f"... {text.count(chr(10))} lines in all; `kvdsl emit kivi2 --out DIR` writes them to a file")


if __name__ == "__main__":
    main()
