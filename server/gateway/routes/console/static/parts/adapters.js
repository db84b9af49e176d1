// The kept versions of a user's adapter; one of them serves.
import { call, userPath, wasStopped } from '../api.js';
import { html, useEffect, useState } from './html.js';
import { Facts, Notice } from './widgets.js';
import { bytes, loss, moment } from './words.js';

/** `serving` is the id of the adapter that serves; `onServe` is called once another one does. */
export function Adapters({ id, serving, onServe }) {
	const [versions, setVersions] = useState([]);
	const [fault, setFault] = useState(null);
	const [sending, setSending] = useState(false);
	useEffect(() => {
		if (!serving) return undefined;
		const stop = new AbortController();
		call('GET', `${userPath(id)}/adapters`, undefined, { signal: stop.signal })
			.then((told) => { setVersions(told.adapters); setFault(null); }, (error) => wasStopped(error) || setFault(error));
		return () => stop.abort();
	}, [id, serving]);

	async function serve(version) {
		setSending(true);
		try {
			await call('POST', `${userPath(id)}/adapters/${version}/serve`);
			onServe();
		} catch (error) {
			setFault(error);
		}
		setSending(false);
	}

	return html`<section class="card" aria-label="Adapter">
		<h2>Adapter of their own</h2>
		<${Notice} error=${fault} />
		${!serving && html`<p class="dim">None: not trained on any samples.</p>`}
		${serving && versions.map((kept) => html`<section key=${kept.version} aria-label=${`Version ${kept.version}`}>
			<h3>Version ${kept.version}
				${' '}${kept.serving && !kept.stale && html`<span class="level stacked">serving</span>`}
				${!kept.serving && !kept.stale && html`<button type="button" class="quiet" disabled=${sending}
					onClick=${() => serve(kept.version)}>Serve this one</button>`}
			</h3>
			<${Facts} label=${`Version ${kept.version}`} rows=${[
				['Made', moment(kept.created_at)],
				['Samples', kept.samples],
				['Loss on held-out samples', kept.after == null ? null : `${loss(kept.before)} → ${loss(kept.after)}`],
				['Size', bytes(kept.bytes)],
				['Id', kept.id, true],
				['Trained on', kept.recipe, true],
			]} />
			${kept.stale && html`<p class="notice calm">It belongs to another bank, so it is not served.</p>`}
		</section>`)}
	</section>`;
}
