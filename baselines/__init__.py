"""The methods that Proxy-RLHF is compared with, behind one contract, see `policy.py`."""
