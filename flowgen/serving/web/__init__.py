"""The local web page of `flowgen explore`."""
