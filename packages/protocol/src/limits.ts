/**
 * Owns every bound on what may cross a process boundary. A message beyond a bound is refused at the receiver.
 */
export const LIMITS = {
  idCharacters: 64,
  stopStrings: 16,
  stopStringCharacters: 256,
  topLogprobs: 20,
  messages: 1024,
  /** Parts of the content of one message (HTTP). */
  contentParts: 1024,
  maxTokens: 1_000_000,
  /** Tokens of one prompt, whatever the context of the model. */
  promptTokens: 1_000_000,
  /** Bytes of one body on lamina.v1.generate, below what nats-server lets through. */
  generateBodyBytes: 4 * 1024 * 1024,
  /** Arrays, maps and entries of maps of one such body in msgpack: a few for each of `messages`. */
  generateBodyParts: 16_384,
  /** Arrays, maps and entries of maps of one msgpack message: a block table for the longest prompt has 400,000. */
  messageParts: 1_048_576,
  /** Arrays and maps of a msgpack message that lie within each other. */
  messageDepth: 32,
  /** Segments (requests) of one step plan. */
  planSegments: 65_536,
  /** Query or KV rows of one step plan. */
  planRows: 1_048_576,
  /** Block table entries of one step plan. */
  planBlocks: 4_194_304,
  /** Bytes of one logical tensor-plane message before it is split. */
  tensorBytes: 1_073_741_824,
  layers: 1024,
  /** Origins (workers) of one executor. */
  originsOfExecutor: 256,
  /** Origins that a shard is told to refuse at once: those of one registration, former ones included. */
  originsOfFence: 512,
  /** Fences in one heartbeat reply; the shard confirms them and is told the next. */
  fencesOfReply: 16,
} as const;
