"""``python -m transformer_lens_taskvec`` is the ``taskvec`` command."""

from transformer_lens_taskvec.cli import app

if __name__ == "__main__":
    app(prog_name="taskvec")
