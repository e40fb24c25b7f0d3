"""stub"""
load_expert=pack_bundle=push_bundle=None
