"""The picture of a cache: each file a strip, each page or group of pages a cell; as a web page and as PNG."""
