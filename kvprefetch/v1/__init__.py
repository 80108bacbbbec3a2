"""Generated from proto/kvprefetch/v1 by grpcio-tools 1.76; `tests/test_proto.py` compares."""
