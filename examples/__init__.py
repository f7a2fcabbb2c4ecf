"""
Small applications that use lsn_consistency; each is run by a test.
"""
