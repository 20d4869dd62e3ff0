"""Recording a training while it runs; this folder only writes runs and never reads them."""
