import sys

from examples.lic import parts
from examples.lic.refinement import study

ABOUT = "Refine the latents of held-out photographs with a trained codec, in many ways."

if __name__ == "__main__":
    sys.exit(parts.main(study, "refinement", ABOUT))
