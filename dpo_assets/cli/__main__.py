import sys

from dpo_assets.cli import main

sys.exit(main())
