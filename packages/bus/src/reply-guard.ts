/**
 * Owns where a service answers, and where its own answers come to.
 *
 * Invariants
 * 1. A caller is not answered on a subject of Lamina or of the server: who may only ask could otherwise have this process
 *    publish there.
 * 2. nats.js answers $SRV by itself, so what its handlers must not see is kept from them where they subscribe.
 * 3. The inbox of a process is a secret: the id under which nats.js announces a service comes from the sequence that it makes
 *    inboxes and request tokens from, so whoever asks $SRV could guess them, and name one as the reply of a request.
 */
import { randomBytes } from 'node:crypto';
import { inboxPrefixOf } from '@lamina/protocol';
import type { Msg, NatsConnection } from 'nats';

/** No caller's inbox: what the server or a service listens to. */
const SYSTEM_SUBJECT = /^(\$|lamina\.)/;
const DISCOVERY = '$SRV.';

export function isForbiddenReply(reply: string | undefined): boolean {
  return reply !== undefined && SYSTEM_SUBJECT.test(reply);
}

/** Lets those messages on $SRV through to what `connection` subscribes from now on that `mayAnswer` accepts. */
export function guardDiscovery(connection: NatsConnection, mayAnswer: (message: Msg) => boolean): void {
  const subscribe = connection.subscribe.bind(connection);
  connection.subscribe = (subject, options) => {
    const callback = options?.callback;
    if (callback === undefined || !subject.startsWith(DISCOVERY)) return subscribe(subject, options);
    return subscribe(subject, {
      ...options,
      callback: (error, message) => {
        if (error !== null || mayAnswer(message)) callback(error, message);
      },
    });
  };
}

/** Where the answers to requests of this process go: within what its user may subscribe to, and known to nobody else. */
export function secretInboxPrefix(user: string): string {
  return `${inboxPrefixOf(user)}.${randomBytes(15).toString('base64url')}`;
}
