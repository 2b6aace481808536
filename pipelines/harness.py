"""`python -m pipelines.harness`: lm-eval's own command line with one more model.

The model is called `griffin`. It scores log-likelihoods, and takes the name of a method and the fields of
`griffin.Method`:

    python -m pipelines.harness --model griffin --model_args pretrained=NAME,method=griffin,sparsity=0.5 --tasks piqa

Texts need no command of ours: lm-eval's own takes a method in `--gen_kwargs` (docs/library.md).
"""

from pipelines.tasks.harness_model import main

if __name__ == "__main__":
    main()
