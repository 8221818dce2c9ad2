import sys

from examples.lic import parts
from examples.lic.ablations import study

ABOUT = "Take balanced training apart, piece by piece, and see what each piece is good for."

if __name__ == "__main__":
    sys.exit(parts.main(study, "ablations", ABOUT))
