/**
 * Owns the work item: a validated, tokenized prompt in the JetStream work queue between gateways and dense-executors.
 */
import { z } from 'zod';
import { LIMITS } from './limits.ts';
import { idSchema } from './schema.ts';

const samplingSchema = z.object({
  /** 0 = greedy. */
  temperature: z.number().min(0),
  /** 1 = off. */
  topP: z.number().gt(0).max(1),
  /** 0 = off. */
  topK: z.int().min(0),
  /** 0 = off. */
  minP: z.number().min(0).max(1),
  seed: z.int(),
});
export type Sampling = z.infer<typeof samplingSchema>;

export const workItemSchema = z.object({
  id: idSchema,
  model: z.string(),
  tokenIds: z.array(z.int().min(0)).min(1).max(LIMITS.promptTokens),
  maxTokens: z.int().min(1).max(LIMITS.maxTokens),
  sampling: samplingSchema,
  stop: z.array(z.string().min(1)).max(LIMITS.stopStrings),
  /** Alternatives per token, or null when no log-probabilities are wanted. */
  logprobs: z.int().min(0).max(LIMITS.topLogprobs).nullable(),
  ignoreEos: z.boolean(),
  priority: z.int(),
  /** Unix time in ms after which the request is given up, or null. */
  deadlineAtMs: z.number().nullable(),
  encoding: z.enum(['json', 'msgpack']),
  submittedAtMs: z.number(),
  /** Whose it is: executors are fair between clients. Absent: the client of all that name none. */
  client: idSchema.optional(),
  /** A part of the answer was stored before the item was lost: it is continued, also on its first delivery. */
  isContinued: z.boolean().optional(),
});
export type WorkItem = z.infer<typeof workItemSchema>;
