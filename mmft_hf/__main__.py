"""`python -m mmft_hf VERB …`"""

import sys

from .cli import main

sys.exit(main())
