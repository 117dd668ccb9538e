"""The pair model: does a perfect answer to one prompt answer another perfectly, too?"""
