/**
 * Owns reading the bodies of /v1/completions and /v1/chat/completions as requests of ours.
 *
 * Invariants
 * 1. A field that would change the answer and is not supported is refused, never ignored; null means not given.
 * 2. Bounds are those of `lamina.v1.generate`: what is read here is checked by its schema.
 */
import { checkGenerateRequest, describeIssues, type GenerateRequest, LIMITS } from '@lamina/protocol';
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

function isTexts(value: unknown): boolean {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return false;
  return Object.values(value).every((each) => typeof each === 'string');
}

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
  metadata: z.custom<Readonly<Record<string, string>>>(isTexts, 'must be an object of texts').optional(),
  store: z.boolean().optional(),
  service_tier: z.string().optional(),
  // Ours.
  top_k: passed,
  min_p: passed,
  ignore_eos: passed,
  priority: passed,
  deadline_ms: passed,
} as const;

/** One text, alone or in an array, or token ids, which are checked later. */
const promptSchema = z.unknown().transform((prompt, context): string | unknown[] => {
  const only: unknown = Array.isArray(prompt) && prompt.length === 1 ? prompt[0] : prompt;
  if (typeof only === 'string') return only;
  if (Array.isArray(prompt) && prompt.length > LIMITS.promptTokens) {
    const message = `has ${prompt.length} tokens; at most ${LIMITS.promptTokens} are taken`;
    context.addIssue({ code: 'custom', message });
  } else if (Array.isArray(prompt) && prompt.length > 0 && prompt.every((id) => typeof id === 'number')) return prompt;
  else context.addIssue({ code: 'custom', message: 'must be one text or one array of token ids' });
  return z.NEVER;
});

const completionSchema = z.strictObject({
  ...common,
  prompt: promptSchema,
  logprobs: passed,
  echo: z.literal(false, unsupported).optional(),
  best_of: z.literal(1, 'must be 1').optional(),
  suffix: z.literal('', unsupported).optional(),
});

const partSchema = z.strictObject({ type: z.literal('text'), text: z.string() });
/** At most one issue, the first: those of all the parts of all the messages of a large bad body would hold this process up for seconds. */
const contentSchema = z.unknown().transform((content, context): string => {
  if (typeof content === 'string') return content;
  const fail = (message: string, path: number[] = []): never => {
    context.addIssue({ code: 'custom', path, message });
    return z.NEVER;
  };
  if (!Array.isArray(content)) return fail('must be text, or an array of parts of the type "text"');
  if (content.length > LIMITS.contentParts) return fail(`at most ${LIMITS.contentParts} parts are taken`);
  const texts: string[] = [];
  for (const [index, part] of content.entries()) {
    const read = partSchema.safeParse(part);
    if (!read.success) return fail('must be {"type": "text", "text": <text>}', [index]);
    texts.push(read.data.text);
  }
  return texts.join('');
});

const messageSchema = z.strictObject({
  role: z
    .enum(['system', 'developer', 'user', 'assistant', 'tool'])
    .transform((role) => (role === 'developer' ? 'system' : role)),
  content: contentSchema,
  name: z.string().optional(),
});

const chatSchema = z.strictObject({
  ...common,
  messages: z
    .array(messageSchema, 'must be an array of messages')
    .max(LIMITS.messages, `at most ${LIMITS.messages} messages are taken`),
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
