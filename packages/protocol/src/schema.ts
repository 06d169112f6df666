/**
 * Owns the schema helpers shared by all messages, and the one way a schema failure becomes an error.
 */
import { type AttentionSpec, type ErrorCode, isErrorCode, type KvLayout, LaminaError } from '@lamina/tensor';
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
});
export type ErrorBody = z.infer<typeof errorBodySchema>;

export const attentionSpecSchema: z.ZodType<AttentionSpec> = z.object({
  numLayers: z.int().min(1).max(LIMITS.layers),
  numHeads: z.int().min(1).max(1024),
  numKvHeads: z.int().min(1).max(1024),
  headDim: z.int().min(8).max(256),
  scale: z.number().positive(),
});

export const kvLayoutSchema: z.ZodType<KvLayout> = z.object({
  numLayers: z.int().min(1).max(LIMITS.layers),
  numHeads: z.int().min(1).max(1024),
  numKvHeads: z.int().min(1).max(1024),
  headDim: z.int().min(8).max(256),
  scale: z.number().positive(),
  blockSizeTokens: z.int().min(8).max(1024).multipleOf(8),
  kvDtype: z.enum(['f16', 'f32']),
});

/** One line per problem: `field: what is wrong`. */
export function describeIssues(error: z.ZodError): string {
  return error.issues
    .map((issue) => (issue.path.length === 0 ? issue.message : `${issue.path.join('.')}: ${issue.message}`))
    .join('; ');
}

/** @throws LaminaError `protocol_violation` naming the message and its bad fields. */
export function parseMessage<T>(name: string, schema: z.ZodType<T>, value: unknown): T {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  throw new LaminaError('protocol_violation', `malformed ${name} message: ${describeIssues(result.error)}`, {
    cause: result.error,
  });
}
