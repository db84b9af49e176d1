// The bank: its anchors on a map, the number of items of each, and the weight rule.
import { call, userPath, wasStopped } from '../api.js';
import { useBank } from '../parts/bank.js';
import { html, useEffect, useRef, useState } from '../parts/html.js';
import { go, note } from '../parts/links.js';
import { AnchorMap } from '../parts/map.js';
import { Anchors, Bar, Facts, Notice, UserId } from '../parts/widgets.js';
import { percent, shortened, SOURCES } from '../parts/words.js';

export function Bank({ params }) {
	const [bank, failure] = useBank();
	const [typed, setTyped] = useState(params.get('user') ?? '');
	const [user, setUser] = useState(null);
	const [fault, setFault] = useState(null);
	useEffect(() => { if (typed) look(); }, []);

	const looking = useRef();
	async function look() {
		looking.current?.abort();
		const { signal } = looking.current = new AbortController();
		setFault(null);
		setUser(null);
		note('bank', { user: typed.trim() });
		try {
			setUser(await call('GET', userPath(typed.trim()), undefined, { signal }));
		} catch (error) {
			if (wasStopped(error)) return;
			setFault(error);
		}
	}

	const submit = (event) => { event.preventDefault(); look(); };
	return html`
		<h1 tabindex="-1">Bank</h1>
		<p class="lead">The anchors: people whose adapters are merged for all other users.</p>
		<${Notice} error=${failure} again=${() => location.reload()} />
		${!bank && !failure && html`<p class="dim" role="status">Reading the bank …</p>`}
		${bank && html`
			<div class="columns">
				<section class="card" aria-label="Map of the anchors">
					<h2>Map</h2>
					<${AnchorMap} anchors=${bank.anchors} user=${user} />
					<p class="hint">Close anchors write about similar topics. A larger dot has more items.${explained(bank.map)}</p>
					<form class="inline" onSubmit=${submit}>
						<${UserId} label="Show a user" value=${typed} onValue=${setTyped} />
						<button type="submit">Show</button>
					</form>
					<${Notice} error=${fault} />
					<div class="stack" aria-live="polite">${user && html`<${Shown} user=${user} />`}</div>
				</section>
				<${Rule} rule=${bank.rule} />
				<section class="card" aria-label="About the bank">
					<h2>This bank</h2>
					<${Facts} label="This bank" rows=${[
						['Bank', bank.bank, true],
						['Task', bank.task?.name.replaceAll('_', ' ')],
						['Base model', bank.model],
						['Embedder', shortened(bank.embedder, 16), true],
						['Fusion', bank.method],
						['Rank', `${bank.rank}, served in slots of ${bank.serving_rank}`],
						['Common row', bank.common_row ? 'yes, in every answer' : 'none'],
					]} />
				</section>
				<${AnchorTable} anchors=${bank.anchors} />
			</div>`}`;
}

const explained = ({ explained: shares }) => ` The two axes cover ${percent(shares[0] + shares[1])} of the variance.`;

function Shown({ user }) {
	return html`<h3><a class="mono" href=${go('users', { id: user.user_id })}>${shortened(user.user_id, 64)}</a></h3>
		<p class="hint">Chosen ${SOURCES[user.source] ?? `by ${user.source}`}.</p>
		<${Anchors} anchors=${user.anchors} detailed />`;
}

function Rule({ rule }) {
	return html`<section class="card" aria-label="The rule of weights">
		<h2>Weight rule</h2>
		<p>${rule.says}</p>
		<${Facts} label="Constants of the rule" rows=${[
			['Rule', rule.name],
			...Object.entries(rule.constants ?? {}).map(([name, value]) => [name, String(value), true]),
		]} />
	</section>`;
}

function AnchorTable({ anchors }) {
	const most = Math.max(...anchors.map(({ items }) => items));
	return html`<section class="card" aria-label="Anchors">
		<h2>Anchors</h2>
		<div class="scroll" tabindex="0" role="region" aria-label="Items of each anchor">
			<table>
				<thead><tr><th scope="col">Anchor</th><th scope="col" class="figure">Items</th><th><span class="unseen">Share of the most</span></th></tr></thead>
				<tbody>${anchors.map(({ id, items, words }) => html`<tr key=${id}>
					<th scope="row" class="mono">${id}</th><td class="figure">${items}</td><td class="long"><${Bar} share=${items / most} />${words?.join(', ')}</td>
				</tr>`)}</tbody>
			</table>
		</div>
	</section>`;
}
