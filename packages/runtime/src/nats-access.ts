/** Owns how the configuration becomes the way a process connects to NATS. Carries paths, never a secret. */
import type { NatsAccess } from '@lamina/bus';
import type { Config } from './settings.ts';

/** @param defaultUser Who connects when LAMINA_NATS_USER is not set: the service. */
export function natsAccessOf(
  config: Pick<Config, 'natsUser' | 'natsPasswordFile' | 'natsTlsCaFile' | 'natsTlsCertificateFile' | 'natsTlsKeyFile'>,
  defaultUser: string,
): NatsAccess {
  return {
    user: config.natsUser ?? defaultUser,
    passwordFile: config.natsPasswordFile,
    tlsCaFile: config.natsTlsCaFile,
    tlsCertificateFile: config.natsTlsCertificateFile,
    tlsKeyFile: config.natsTlsKeyFile,
  };
}
