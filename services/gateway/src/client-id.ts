/**
 * Owns telling clients apart: fairness and limits are per client, whatever protocol it speaks.
 */
import { idSchema } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

/** Header of a NATS message or an HTTP request that names the client. */
export const CLIENT_HEADER = 'Lamina-Client';
/** All that name none. */
export const DEFAULT_CLIENT = 'default';

/**
 * The client that a header names; all that name none are one.
 * @throws LaminaError `invalid_request`
 */
export function clientIdOf(header: string | undefined): string {
  if (header === undefined) return DEFAULT_CLIENT;
  const checked = idSchema.safeParse(header);
  if (checked.success) return checked.data;
  const problem = checked.error.issues[0]?.message ?? 'is no id';
  throw new LaminaError('invalid_request', `the header ${CLIENT_HEADER} ${problem}`);
}
