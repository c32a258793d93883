"""What the scripts share. Read train.py, model.py, prepare.py and sample.py first."""
