/**
 * Owns the choice of the connection that tensors travel on.
 *
 * A token takes two hops per layer, and much of a hop over nats.js is nats.js and the streams below it (docs/performance.md). So
 * tensors have a connection of their own, which speaks the few lines of the NATS protocol that they need natively. Where it
 * cannot be had (no compiler at the build, TLS), nats.js carries them.
 */
import { LaminaError } from '@lamina/tensor';
import { BusLink } from './bus-link.ts';
import type { BusEvents } from './bus-message.ts';
import { type BusOptions, wantsTls } from './connection.ts';
import { NativeLink } from './native-link.ts';
import { noNativeLinkReason } from './native-socket.ts';
import type { TensorLink } from './tensor-link.ts';

/** auto: native if it can be had. */
export const TENSOR_LINK_KINDS = ['auto', 'native', 'nats'] as const;
export type TensorLinkKind = (typeof TENSOR_LINK_KINDS)[number];

export interface OpenedLink {
  readonly link: TensorLink;
  /** Why it is not the native one, though that was not asked for; null otherwise. */
  readonly fallbackReason: string | null;
}

/** @throws LaminaError `nats_unreachable`; `config_invalid` when only a native link is wanted and cannot be had. */
export async function openTensorLink(
  options: BusOptions,
  events: BusEvents,
  kind: TensorLinkKind = 'auto',
): Promise<OpenedLink> {
  let reason = noNativeLinkReason;
  if (kind !== 'nats' && reason === undefined && wantsTls(options)) reason = 'TLS is spoken by nats.js only';
  if (kind !== 'nats' && reason === undefined) {
    const link = await NativeLink.connect(options, events);
    if (link !== undefined) return { link, fallbackReason: null };
    reason = 'nats-server wants TLS, which is spoken by nats.js only';
  }
  if (kind === 'native')
    throw new LaminaError('config_invalid', `no native connection for tensors: ${reason}; set LAMINA_TENSOR_LINK=auto`);
  return { link: await BusLink.connect(options, events), fallbackReason: kind === 'nats' ? null : (reason ?? null) };
}
