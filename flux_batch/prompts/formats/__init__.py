"""The formats of prompts files, one module each, behind one protocol: columns, row ranges, rows."""
