"""`python -m pipelines.harness`: lm-eval's own command line with one more model.

The model is called `griffin`, and takes the name of a method and the fields of `griffin.Method`:

    python -m pipelines.harness --model griffin --model_args pretrained=NAME,method=griffin,sparsity=0.5 --tasks piqa
"""

from pipelines.tasks.harness_model import main

if __name__ == "__main__":
    main()
