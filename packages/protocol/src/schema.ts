/**
 * Owns the schema helpers shared by all messages, and the one way a schema failure becomes an error.
 */
import {
  type AttentionSpec,
  type ErrorCode,
  HEAD_DIM_RANGE,
  isErrorCode,
  type KvLayout,
  LaminaError,
} from '@lamina/tensor';
import { z } from 'zod';
import { LIMITS } from './limits.ts';

/** Safe as one NATS subject token: no dots, wildcards or spaces. */
export const idSchema = z
  .string()
  .regex(/^[A-Za-z0-9_-]+$/, 'must consist of letters, digits, "-" and "_"')
  .max(LIMITS.idCharacters, `must have at most ${LIMITS.idCharacters} characters`);

export const errorBodySchema = z.object({
  code: z.custom<ErrorCode>(isErrorCode, 'unknown error code'),
  message: z.string(),
  /** When trying again is worthwhile. */
  retryAfterMs: z.number().min(0).optional(),
});
export type ErrorBody = z.infer<typeof errorBodySchema>;

/** All of an error that leaves its process: never its cause and its diagnostics. */
export function errorBodyOf({ code, message, retryAfterMs }: LaminaError): ErrorBody {
  return { code, message, ...(retryAfterMs !== undefined && { retryAfterMs }) };
}

/** The error that was sent. */
export function errorOf({ code, message, retryAfterMs }: ErrorBody): LaminaError {
  return new LaminaError(code, message, { retryAfterMs });
}

const perHead = z.array(z.number()).max(1024);

const attentionFields = {
  numLayers: z.int().min(1).max(LIMITS.layers),
  numHeads: z.int().min(1).max(1024),
  numKvHeads: z.int().min(1).max(1024),
  headDim: z.int().min(HEAD_DIM_RANGE.minimum).max(HEAD_DIM_RANGE.maximum).multipleOf(HEAD_DIM_RANGE.multipleOf),
  scale: z.number().positive(),
  softcap: z.number().positive().optional(),
  windowTokens: z.array(z.int().min(0)).max(LIMITS.layers).optional(),
  sinkLogits: z.array(perHead).max(LIMITS.layers).optional(),
  alibiSlopes: perHead.optional(),
};

/** Arrays must have as many entries as there are layers or heads. */
function hasRightLengths({ numLayers, numHeads, windowTokens, sinkLogits, alibiSlopes }: AttentionSpec): boolean {
  return (
    (windowTokens === undefined || windowTokens.length === numLayers) &&
    (sinkLogits === undefined ||
      (sinkLogits.length === numLayers && sinkLogits.every((logits) => logits.length === numHeads))) &&
    (alibiSlopes === undefined || alibiSlopes.length === numHeads)
  );
}

const LENGTHS_MESSAGE =
  'windowTokens and sinkLogits need an entry per layer, sinkLogits[l] and alibiSlopes one per head';

export const attentionSpecSchema: z.ZodType<AttentionSpec> = z
  .object(attentionFields)
  .refine(hasRightLengths, LENGTHS_MESSAGE);

export const kvLayoutSchema: z.ZodType<KvLayout> = z
  .object({
    ...attentionFields,
    blockSizeTokens: z.int().min(8).max(1024).multipleOf(8),
    kvDtype: z.enum(['f16', 'f32']),
  })
  .refine(hasRightLengths, LENGTHS_MESSAGE);

/** Bounds of a description: it travels in a reply, which must fit a message whatever was sent. */
const MAX_ISSUES = 16;
const MAX_ISSUE_CHARACTERS = 300;

/** The first problems, `field: what is wrong`, and how many more there are. */
export function describeIssues(error: z.ZodError): string {
  const { issues } = error;
  const lines = issues.slice(0, MAX_ISSUES).map((issue) => {
    const line = issue.path.length === 0 ? issue.message : `${issue.path.join('.')}: ${issue.message}`;
    return line.length <= MAX_ISSUE_CHARACTERS ? line : `${line.slice(0, MAX_ISSUE_CHARACTERS)}...`;
  });
  if (issues.length > MAX_ISSUES) lines.push(`and ${issues.length - MAX_ISSUES} more`);
  return lines.join('; ');
}

/** @throws LaminaError `protocol_violation` naming the message and its bad fields. */
export function parseMessage<T>(name: string, schema: z.ZodType<T>, value: unknown): T {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  throw new LaminaError('protocol_violation', `malformed ${name} message: ${describeIssues(result.error)}`, {
    cause: result.error,
  });
}
