"""What agents speak to: OpenAI's chat completions, for one episode per key.

request --keys--> session --requests--> checked --calls--> new, or the same call again
                                                                 |
client <--exchange-- answers <-- tree.add <-- servers.generate <-- tree.prepare
"""
