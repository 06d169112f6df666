/**
 * Owns the body of `lamina.v1.generate`: plain text, a JSON object or a msgpack map, and its validation.
 *
 * Invariants
 * 1. A body that starts with `{` must be valid JSON; a body that is a whole msgpack map is one; any other valid UTF-8 is the prompt.
 * 2. Unknown fields are reported, never ignored.
 * 3. Exactly one of prompt, messages and token_ids is given.
 */
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';
import { unpackChecked } from './codec.ts';
import { LIMITS } from './limits.ts';
import { msgpackProblem } from './msgpack-check.ts';
import { describeIssues, idSchema } from './schema.ts';

/** How a client wants its answer: text and JSON are answered in JSON, msgpack in msgpack. */
export type WireEncoding = 'json' | 'msgpack';

const stopStringSchema = z
  .string()
  .min(1, 'a stop string must not be empty')
  .max(LIMITS.stopStringCharacters, `a stop string has at most ${LIMITS.stopStringCharacters} characters`);

/** Where zod's arrays have a maximum, it is looked at before their elements: without one, each bad element is an issue. */
const stopStringsSchema = z
  .array(stopStringSchema, 'must be a text or an array of texts')
  .max(LIMITS.stopStrings, `at most ${LIMITS.stopStrings} stop strings are taken`);

/** One pass and at most one issue, the first: an issue per token of a large bad prompt would hold its reader up for seconds. */
const tokenIdsSchema = z
  .custom<number[]>(Array.isArray, 'must be an array of token ids')
  .superRefine((ids, context) => {
    if (ids.length === 0) context.addIssue({ code: 'custom', message: 'must not be empty' });
    if (ids.length > LIMITS.promptTokens)
      context.addIssue({
        code: 'custom',
        message: `has ${ids.length} tokens; at most ${LIMITS.promptTokens} are taken`,
      });
    const bad = ids.findIndex((id) => !Number.isSafeInteger(id) || id < 0);
    if (bad >= 0) context.addIssue({ code: 'custom', path: [bad], message: 'must be an integer that is at least 0' });
  });

export const generateRequestSchema = z
  .strictObject({
    id: idSchema.optional(),
    model: z.string().min(1).max(256).optional(),
    prompt: z.string().min(1, 'must not be empty').optional(),
    messages: z
      .array(z.strictObject({ role: z.enum(['system', 'user', 'assistant', 'tool']), content: z.string() }))
      .min(1, 'must not be empty')
      .max(LIMITS.messages, `at most ${LIMITS.messages} messages are taken`)
      .optional(),
    token_ids: tokenIdsSchema.optional(),
    max_tokens: z.int().min(1).max(LIMITS.maxTokens).optional(),
    temperature: z.number().min(0).max(100).optional(),
    top_p: z.number().gt(0).max(1).optional(),
    top_k: z.int().min(0).optional(),
    min_p: z.number().min(0).max(1).optional(),
    seed: z.int().optional(),
    stop: z
      .unknown()
      .transform((stop) => (typeof stop === 'string' ? [stop] : stop))
      .pipe(stopStringsSchema)
      .optional(),
    logprobs: z.union([z.boolean(), z.int().min(0).max(LIMITS.topLogprobs)]).optional(),
    ignore_eos: z.boolean().optional(),
    priority: z.int().min(-100).max(100).optional(),
    deadline_ms: z.int().min(1).optional(),
  })
  .superRefine((request, context) => {
    const given = (['prompt', 'messages', 'token_ids'] as const).filter((field) => request[field] !== undefined);
    if (given.length !== 1) {
      const found = given.length === 0 ? 'none is there' : `${given.join(' and ')} are there`;
      context.addIssue({ code: 'custom', message: `give exactly one of prompt, messages and token_ids; ${found}` });
    }
  });

export type GenerateRequest = z.infer<typeof generateRequestSchema>;

export interface ParsedGenerateBody {
  readonly encoding: WireEncoding;
  readonly request: GenerateRequest;
}

const utf8 = new TextDecoder('utf-8', { fatal: true });

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** Why a body is no msgpack map; undefined when it is one. Only a map begins with fixmap, map 16 or map 32. */
function mapProblem(body: Uint8Array): string | undefined {
  const firstByte = body[0]!;
  const isMapHead = (firstByte >= 0x80 && firstByte <= 0x8f) || firstByte === 0xde || firstByte === 0xdf;
  return isMapHead ? msgpackProblem(body, LIMITS.generateBodyParts) : 'it does not begin like a map';
}

function decodeBody(body: Uint8Array): { encoding: WireEncoding; value: unknown } {
  if (body.length === 0)
    throw new LaminaError('invalid_request', 'the body is empty; send a prompt as text or a JSON object');
  if (body.length > LIMITS.generateBodyBytes) {
    throw new LaminaError(
      'invalid_request',
      `the body has ${body.length} bytes; at most ${LIMITS.generateBodyBytes} are taken`,
    );
  }
  const problem = mapProblem(body);
  if (problem === undefined) return { encoding: 'msgpack', value: unpackChecked(body) };
  let text: string;
  try {
    text = utf8.decode(body);
  } catch (cause) {
    throw new LaminaError('invalid_request', `the body is neither UTF-8 text nor a msgpack map: ${problem}`, { cause });
  }
  if (!text.startsWith('{')) return { encoding: 'json', value: { prompt: text } };
  try {
    return { encoding: 'json', value: JSON.parse(text) };
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LaminaError('invalid_request', `the body starts with "{" but is not valid JSON: ${reason}`, { cause });
  }
}

/** The encoding that an answer to `body` has, even if the body is bad. */
export function encodingOf(body: Uint8Array): WireEncoding {
  return body.length > 0 && mapProblem(body) === undefined ? 'msgpack' : 'json';
}

/** The id in a body that is otherwise bad, so that its error can carry it. */
export function requestIdOf(body: Uint8Array): string | undefined {
  try {
    const { value } = decodeBody(body);
    return isMap(value) ? idSchema.safeParse(value.id).data : undefined;
  } catch {
    return undefined;
  }
}

/** @throws LaminaError `invalid_request` that lists the bad fields. */
export function checkGenerateRequest(value: unknown): GenerateRequest {
  const result = generateRequestSchema.safeParse(value);
  if (!result.success) throw new LaminaError('invalid_request', describeIssues(result.error), { cause: result.error });
  return result.data;
}

/** @throws LaminaError `invalid_request` */
export function parseGenerateBody(body: Uint8Array): ParsedGenerateBody {
  const { encoding, value } = decodeBody(body);
  return { encoding, request: checkGenerateRequest(value) };
}
