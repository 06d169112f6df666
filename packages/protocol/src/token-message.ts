/**
 * Owns the answer: token messages on `lamina.v1.tokens.<id>` and to the client's inbox.
 *
 * Invariants
 * 1. Each generated token appears exactly once, in order; `index` counts from 0.
 * 2. `finish_reason` is null until the last message; the last one has the header `Lamina-Final: true`.
 * 3. A last message without a token (cancelled, error) has `token: null` and the index the next token would have had.
 */
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';
import { packMessage, unpackMessage } from './codec.ts';
import type { WireEncoding } from './generate-request.ts';
import { errorBodySchema, idSchema, parseMessage } from './schema.ts';

/** Header of the last message of an answer, value `true`. */
export const FINAL_HEADER = 'Lamina-Final';

/** Header of every stored message of an answer: the indices of its first and last token as `0-7`, or `end` for an end without one. */
export const TOKENS_HEADER = 'Lamina-Tokens';

/** Header of a stored message whose writer was not the first to get the work item: how often it had been given out then. */
export const DELIVERY_HEADER = 'Lamina-Delivery';

const finishReasonSchema = z.enum(['stop', 'length', 'cancelled', 'error']);
export type FinishReason = z.infer<typeof finishReasonSchema>;

export const tokenMessageSchema = z.object({
  id: idSchema,
  index: z.int().min(0),
  token: z.int().min(0).nullable(),
  text: z.string(),
  /** Natural logarithm of the token's probability at temperature 1. */
  logprob: z.number().optional(),
  top_logprobs: z.array(z.object({ token: z.int(), text: z.string(), logprob: z.number() })).optional(),
  finish_reason: finishReasonSchema.nullable(),
  usage: z.object({ prompt_tokens: z.int(), completion_tokens: z.int(), total_tokens: z.int() }).optional(),
  error: errorBodySchema.optional(),
});
export type TokenMessage = z.infer<typeof tokenMessageSchema>;

const answerSchema = z.union([
  tokenMessageSchema.transform((message) => [message]),
  z.array(tokenMessageSchema).min(1),
]);

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** One message as an object, several as an array. */
export function encodeTokens(messages: readonly TokenMessage[], encoding: WireEncoding): Uint8Array {
  const value = messages.length === 1 ? messages[0] : messages;
  return encoding === 'json' ? encoder.encode(JSON.stringify(value)) : packMessage(value);
}

/** How stored messages are encoded: JSON begins with `{` or `[`, which no msgpack map or array does. */
export function storedEncodingOf(bytes: Uint8Array): WireEncoding {
  return bytes[0] === 0x7b || bytes[0] === 0x5b ? 'json' : 'msgpack';
}

/** @throws LaminaError `protocol_violation` */
export function decodeTokens(bytes: Uint8Array): TokenMessage[] {
  const value = storedEncodingOf(bytes) === 'json' ? parseJson(bytes) : unpackMessage(bytes);
  return parseMessage('token', answerSchema, value);
}

function parseJson(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(decoder.decode(bytes));
  } catch (cause) {
    throw new LaminaError('protocol_violation', 'a token message is not valid JSON', {
      cause,
      diagnostics: { bytes: bytes.length },
    });
  }
}
