/**
 * Owns reading the bodies of /v1/completions and /v1/chat/completions as requests of ours.
 *
 * Invariants
 * 1. A field that would change the answer and is not supported is refused, never ignored; null means not given.
 * 2. Bounds are those of `lamina.v1.generate`: what is read here is checked by its schema.
 */
import { checkGenerateRequest, describeIssues, type GenerateRequest } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';

export interface OpenAiRequest {
  readonly generate: GenerateRequest;
  readonly isStream: boolean;
  /** One more event with the usage at the end of a stream. */
  readonly includeUsage: boolean;
}

/** A top_p of 0 means the likeliest token only. */
const MIN_TOP_P = 1e-6;
/** Checked later, by the schema of `lamina.v1.generate`. */
const passed = z.unknown().optional();
const unsupported = 'is not supported';

const common = {
  model: z.string().optional(),
  max_tokens: passed,
  temperature: passed,
  top_p: passed,
  stop: passed,
  seed: passed,
  stream: z.boolean().default(false),
  stream_options: z.object({ include_usage: z.boolean().default(false) }).optional(),
  n: z.literal(1, 'must be 1').optional(),
  presence_penalty: z.literal(0, unsupported).optional(),
  frequency_penalty: z.literal(0, unsupported).optional(),
  logit_bias: z.strictObject({}, unsupported).optional(),
  // Said about a request, not to the model.
  user: z.string().optional(),
  metadata: z.record(z.string(), z.string()).optional(),
  store: z.boolean().optional(),
  service_tier: z.string().optional(),
  // Ours.
  top_k: passed,
  min_p: passed,
  ignore_eos: passed,
  priority: passed,
  deadline_ms: passed,
} as const;

const completionSchema = z.strictObject({
  ...common,
  prompt: z.union(
    [
      z.string(),
      z.array(z.number()).min(1),
      z
        .array(z.string())
        .length(1)
        .transform(([prompt]) => prompt ?? ''),
    ],
    'must be one text or one array of token ids',
  ),
  logprobs: passed,
  echo: z.literal(false, unsupported).optional(),
  best_of: z.literal(1, 'must be 1').optional(),
  suffix: z.literal('', unsupported).optional(),
});

const contentSchema = z.union(
  [
    z.string(),
    z
      .array(z.strictObject({ type: z.literal('text'), text: z.string() }))
      .transform((parts) => parts.map(({ text }) => text).join('')),
  ],
  'must be text, or an array of parts of the type "text"',
);

const chatSchema = z.strictObject({
  ...common,
  messages: z.array(
    z.strictObject({
      role: z
        .enum(['system', 'developer', 'user', 'assistant', 'tool'])
        .transform((role) => (role === 'developer' ? 'system' : role)),
      content: contentSchema,
      name: z.string().optional(),
    }),
  ),
  max_completion_tokens: passed,
  logprobs: z.boolean().default(false),
  top_logprobs: z.int().min(0).max(20).optional(),
  response_format: z.strictObject({ type: z.literal('text') }, unsupported).optional(),
});

function withoutNulls(body: unknown): unknown {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new LaminaError('invalid_request', 'the body must be a JSON object');
  }
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
}

function read<T>(schema: z.ZodType<T>, body: unknown): T {
  const result = schema.safeParse(withoutNulls(body));
  if (result.success) return result.data;
  throw new LaminaError('invalid_request', describeIssues(result.error), { cause: result.error });
}

type Common = { readonly [Field in keyof typeof common]?: z.infer<(typeof common)[Field]> };

function requestOf(body: Common, id: string | undefined, own: Readonly<Record<string, unknown>>): OpenAiRequest {
  const { model, max_tokens, temperature, stop, seed, top_k, min_p, ignore_eos, priority, deadline_ms } = body;
  const top_p = body.top_p === 0 ? MIN_TOP_P : body.top_p;
  const fields = { id, model, max_tokens, temperature, top_p, stop, seed, top_k, min_p, ignore_eos, priority };
  return {
    generate: checkGenerateRequest({ ...fields, deadline_ms, ...own }),
    isStream: body.stream ?? false,
    includeUsage: body.stream_options?.include_usage ?? false,
  };
}

/** @throws LaminaError `invalid_request` */
export function readCompletion(body: unknown, id: string | undefined): OpenAiRequest {
  const completion = read(completionSchema, body);
  const { prompt, logprobs } = completion;
  return requestOf(completion, id, {
    ...(typeof prompt === 'string' ? { prompt } : { token_ids: prompt }),
    logprobs,
  });
}

/** @throws LaminaError `invalid_request` */
export function readChatCompletion(body: unknown, id: string | undefined): OpenAiRequest {
  const chat = read(chatSchema, body);
  const { logprobs, top_logprobs } = chat;
  if (!logprobs && top_logprobs !== undefined)
    throw new LaminaError('invalid_request', 'top_logprobs: needs logprobs to be true');
  return requestOf(chat, id, {
    messages: chat.messages.map(({ role, content }) => ({ role, content })),
    max_tokens: chat.max_completion_tokens ?? chat.max_tokens,
    ...(logprobs && { logprobs: top_logprobs ?? true }),
  });
}
